"""From an instruction to the prompt column: chat messages, or plain text for models without a chat template."""

from __future__ import annotations

from atmanrl.config import DataConfig

Prompt = str | list[dict[str, str]]


def as_prompt(instruction: str, config: DataConfig) -> Prompt:
    """``instruction`` as messages ("chat") or as a string that a base model continues ("plain").

    Chat messages are rendered by the tokenizer's own chat template later, where its special tokens are known.
    """
    if config.prompt_style == "plain":
        return f"{instruction}\nResponse:"
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return [*system, {"role": "user", "content": instruction}]
