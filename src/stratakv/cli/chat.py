"""`stratakv chat`: a conversation in which nothing is read twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from stratakv.cli import options
from stratakv.cli.failures import FAILED, report
from stratakv.cli.prompts import check_text
from stratakv.errors import CapacityError, ConfigurationError

if TYPE_CHECKING:
    from stratakv.cli.conversation import Conversation
    from stratakv.cli.generation import Decoding

HELP = "/reset forgets the conversation, /exit or the end of input ends it, Ctrl-C takes back the running turn"


def chat(
    *,
    system: Annotated[str | None, typer.Option(help="The system message.", show_default="the model's own")] = None,
    model: options.Model = "smollm2",
    max_new_tokens: options.MaxNewTokens = 256,
    format: options.Format = None,
    residual: options.Residual = None,
    block_tokens: options.BlockTokens = 64,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "fp32",
    as_json: options.Json = False,
) -> None:
    """Talk with a model, a line a message; each turn feeds only its own tokens.

    /reset forgets the conversation, /exit or the end of input ends it, Ctrl-C takes back the running turn.
    With --json, an object a turn; {"error": ...} where one failed. Exits with 1 where a turn of piped input failed.
    """
    options.check_choice("--format", format, options.FORMATS)
    options.check_choice("--dtype", dtype, options.DTYPES)
    options.check_positive("--max-new-tokens", max_new_tokens)
    options.check_positive("--block-tokens", block_tokens)
    heat, nucleus = options.check_sampling(temperature, top_p)
    if system is not None:
        check_text(system, "the system message")

    from stratakv.cli.conversation import Conversation
    from stratakv.cli.generation import Decoding
    from stratakv.integrations.transformers import KVCache
    from stratakv.models import load, terminal_progress

    with terminal_progress() as progress:
        loaded = load(model, dtype=options.torch_dtype(dtype), progress=progress)
    cache = KVCache.for_model(loaded.model, format=format, residual=residual, block_tokens=block_tokens)
    conversation = Conversation(loaded, cache, system)
    decoding = Decoding(max_new_tokens, heat, nucleus, seed)
    if sys.stdin.isatty():
        typer.echo(f"{loaded.name}: {HELP}", err=True)
    failed = False
    for line in _lines():
        message = line.strip()
        if message == "/exit":
            break
        if message == "/reset":
            conversation.reset()
        elif message.startswith("/"):
            report(f"there is no command {message.split()[0]!r}: {HELP}")
        elif message:
            failed |= not _turn(conversation, message, decoding, loaded.name, as_json=as_json)
    if failed and not sys.stdin.isatty():  # who typed saw it; a script looks at the exit code
        raise typer.Exit(FAILED)


def _turn(conversation: Conversation, message: str, decoding: Decoding, name: str, *, as_json: bool) -> bool:
    """Answer one message; False where it was refused. A refused turn is reported and the chat goes on."""
    from stratakv.cli.conversation import interrupts_between_tokens
    from stratakv.cli.generation import describe

    def show(piece: str) -> None:
        if not as_json:
            typer.echo(piece, nl=False)

    def refused(reason: str) -> bool:
        report(reason)
        if as_json:
            typer.echo(json.dumps({"error": reason}))
        return False

    try:
        check_text(message, "the message")
    except ConfigurationError as error:
        return refused(str(error))
    try:
        with interrupts_between_tokens() as check:
            turn = conversation.ask(message, decoding, on_text=show, on_token=check)
    except KeyboardInterrupt:
        typer.echo(err=True)
        report("interrupted; that turn was taken back")
        return True
    except (ConfigurationError, CapacityError) as error:
        return refused(f"{error}; /reset starts anew" if conversation.token_ids else str(error))
    if as_json:
        described = describe(turn.generated, conversation.cache, model_name=name, n_prompt=turn.n_prompt)
        typer.echo(json.dumps({**described, "fed_tokens": turn.n_fed}))
    else:
        typer.echo()
    return True


def _lines() -> Iterator[str]:
    """Lines of standard input until it ends, with a prompt and line editing where a person types them."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        import readline  # noqa: F401  # its import gives `input` editing and history
    while True:
        try:
            line = input("> ") + "\n" if interactive else sys.stdin.readline()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"standard input is not UTF-8: {error.reason}") from None
        if not line:
            return
        yield line
