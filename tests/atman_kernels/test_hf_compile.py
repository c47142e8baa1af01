"""torch.compile takes the model whole: mask function, attention function and backward without a graph break."""

from __future__ import annotations

import pytest
import torch
import transformers

from atman_kernels import AttentionPlan
from atman_kernels.hf import KeyValueRecord
from tests.atman_kernels.families import padding_mask, random_ids, random_model

one_layer_of_each_kind = pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("gemma2", 2)])
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@one_layer_of_each_kind
def test_one_graph_computes_a_biased_forward_and_its_gradient(family, layers):
    model = random_model(family, num_hidden_layers=layers)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, mask = random_ids(3, 12), padding_mask([12, 7, 3], "left")
    gradients = []
    for forward in (model, compiled):
        bias = torch.full((3, 12), -0.5, requires_grad=True)
        logits = forward(ids, attention_mask=mask, key_bias=bias, use_cache=False).logits
        (logits.logsumexp(-1) * mask).sum().backward()
        gradients.append(bias.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


@one_layer_of_each_kind
def test_compiled_decoding_with_a_static_cache_generates_the_tokens_of_sdpa(family, layers):
    ids, mask = random_ids(3, 12), padding_mask([12, 7, 3], "left")
    compile_config = transformers.CompileConfig(backend="aot_eager", fullgraph=True)
    # transformers compiles on accelerators only unless told otherwise.
    compile_config._compile_all_devices = True
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    compiled = random_model(family, num_hidden_layers=layers).generate(
        ids, cache_implementation="static", compile_config=compile_config, **settings
    )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    eager = random_model(family, "sdpa", num_hidden_layers=layers)
    assert torch.equal(compiled, eager.generate(ids, **settings))


def test_one_graph_computes_packed_batches_of_one_shape():
    model = random_model("gemma2", num_hidden_layers=2).requires_grad_(False)
    record = KeyValueRecord()
    model(random_ids(1, 7), capture=record, use_cache=False)
    # A 4D mask keeps transformers from looking for packed sequences in position_ids.
    unread = torch.empty(1, 1, 0, 0)

    def step(ids, position_ids, plan, key_bias):
        return model(
            ids,
            attention_mask=unread,
            position_ids=position_ids,
            attention_plan=plan,
            shared_prefix=record,
            key_bias=key_bias,
            logits_to_keep=torch.tensor([2, 8]),
            use_cache=False,
        ).logits

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for lengths in ([3, 6], [2, 7], [5, 4]):
        plan = AttentionPlan(lengths, prefix_start=[0, 0], prefix_length=[7, 4])
        position_ids = torch.cat([torch.arange(7, 7 + lengths[0]), torch.arange(4, 4 + lengths[1])])[None]
        bias = torch.zeros(1, 9, requires_grad=True)
        logits = [forward(random_ids(1, 9), position_ids, plan, bias) for forward in (compiled, step)]
        gradients = [torch.autograd.grad(x.logsumexp(-1).sum(), bias)[0] for x in logits]
        assert gradients[1].abs().max() > 0
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
