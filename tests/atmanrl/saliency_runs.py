"""Small runs made by hand, for the tests of summaries and views."""

from __future__ import annotations

from collections.abc import Sequence

from atmanrl.evaluation.records import MaskLoss, RolloutRecord, Run, TokenSpan

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "'&amp;<b>",
    "{{ 7 * 7 }}",
    "\u202egnp.exe",
    "\u2067",
    "\u200b",
    "👩‍👩‍👧‍👦",
    "שלום",
    "\x1b[31m",
    "\x00",
    "]]>",
    "<!--",
    "",
    " ",
    "\n\n",
    "\ue000",
)


def span(*texts: str) -> TokenSpan:
    return TokenSpan(tuple(range(len(texts))), texts)


def rollout(
    prompt_id: str = "p0",
    texts: Sequence[str] = ("a", " 6", " ~"),
    restored: Sequence[float] | None = (0.1, 0.4, 0.02),
    classes: Sequence[str] = (),
    correct: bool | None = True,
    sample: int = 0,
    prompt: str = "<b> a 6 ? a",
    predicted: str | None = "6",
    **fields: object,
) -> RolloutRecord:
    return RolloutRecord(
        prompt_id=prompt_id,
        sample=sample,
        prompt=TokenSpan(tuple(map(ord, prompt)), tuple(prompt)),
        cot=span(*texts),
        marker=span(" <ans>"),
        answer=span(" 6"),
        rest=span(" <eos>"),
        classes=tuple(classes),
        scores={} if restored is None else {"restored": tuple(restored)},
        predicted=predicted,
        expected="6",
        correct=correct,
        loss=MaskLoss(2.0, 0.5, 0.1),
        **fields,  # type: ignore[arg-type]
    )


def run(*rollouts: RolloutRecord, label: str = "before") -> Run:
    return Run(label, rollouts, settings={"model": "tiny", "mask": {"steps": 200, "lr": 1e-3}})
