"""`stratakv generate`: continue a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stratakv.cli import options
from stratakv.cli.prompts import check_positions, read_prompt
from stratakv.errors import ConfigurationError


def generate(
    context: typer.Context,
    *,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the text; - is standard input.")] = None,
    model: options.Model = "smollm2",
    max_new_tokens: options.MaxNewTokens = 128,
    format: options.Format = None,
    residual: options.Residual = None,
    layout: options.Layout = "paged",
    block_tokens: options.BlockTokens = 64,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "fp32",
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Take the prompt as a message to answer, not a text to continue.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Continue a text, and say what its keys and values cost.

    The text goes to stdout as it comes, a summary to stderr.
    """
    options.check_choice("--format", format, options.FORMATS)
    options.check_choice("--layout", layout, options.LAYOUTS)
    options.check_choice("--dtype", dtype, options.DTYPES)
    options.check_positive("--max-new-tokens", max_new_tokens)
    options.check_block_tokens(context, block_tokens, layout)
    heat, nucleus = options.check_sampling(temperature, top_p)
    text = read_prompt(prompt, file)

    from stratakv.cli.generation import Decoding, continue_tokens, describe, summary
    from stratakv.integrations.transformers import KVCache
    from stratakv.models import load, terminal_progress

    with terminal_progress() as progress:
        loaded = load(model, dtype=options.torch_dtype(dtype), progress=progress)
    tokenizer = loaded.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise ConfigurationError(f"the model {loaded.name!r} has no chat template; leave --chat out")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    token_ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    if not token_ids:
        raise ConfigurationError("the prompt has no tokens")
    check_positions(loaded.model, len(token_ids), max_new_tokens)
    capacity = len(token_ids) + max_new_tokens if layout == "contiguous" else None
    cache = KVCache.for_model(
        loaded.model, format=format, residual=residual, layout=layout, block_tokens=block_tokens, capacity=capacity
    )

    def show(piece: str) -> None:
        typer.echo(piece, nl=False)

    generated = continue_tokens(
        loaded.model,
        tokenizer,
        cache,
        token_ids,
        Decoding(max_new_tokens, heat, nucleus, seed),
        on_text=(lambda piece: None) if as_json else show,
    )
    described = describe(generated, cache, model_name=loaded.name, n_prompt=len(token_ids))
    if as_json:
        typer.echo(json.dumps(described))
        return
    typer.echo()
    typer.echo(summary(described), err=True)
