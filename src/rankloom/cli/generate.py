"""``rankloom generate``: continue prompts with a trained run, an adapter on a model, or a base model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit

__all__ = ["command"]


def command(
    run: options.Run = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be given several times; else one a line of stdin.")
    ] = None,
    model: options.Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Leave the adapter out, to see what it changed.")] = False,
    dtype: options.Dtype = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Continue prompts.

    rankloom generate runs/latest --prompt "Review: a delight from start to finish.\\nSentiment:"
    """
    from rankloom.errors import DataError
    from rankloom.training.progress import say_to_stderr
    from rankloom.training.restore import generate, restore

    # A shell passes \n as two characters; prompts usually mean a line break.
    prompts = [text.replace("\\n", "\n") for text in prompt or []] or [
        line.rstrip("\n") for line in sys.stdin if line.strip()
    ]
    if not prompts:
        raise DataError("no prompt: give --prompt, or lines on stdin")
    restored = restore(run, options={"model": model, "dtype": dtype}, force=force, base=base, say=say_to_stderr)
    texts = generate(restored, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=chat)
    if json:
        emit([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)])
        return
    for p, t in zip(prompts, texts, strict=True):
        print(p + t if not chat else t)
