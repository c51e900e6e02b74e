"""The command line: flags and help only, so that `--help` answers without loading torch; verbs are imported when called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from forerun import __version__
from forerun.types import UserError

app = typer.Typer(
    name="forerun", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Speculative decoding for Hugging Face causal language models, and an honest measurement of what it gains.",
)  # fmt: skip

Model = Annotated[str | None, typer.Option(help="Target: hub id or folder. Default: the model that ships with forerun.")]
Draft = Annotated[str | None, typer.Option(help="Draft model: hub id or folder, with the target's vocabulary.")]
Method = Annotated[str | None, typer.Option(help="naive, ngram, draft, medusa or eagle.")]
Length = Annotated[int | None, typer.Option("-k", help="Tokens to draft each round.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most new tokens.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampling.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
Small = Annotated[bool, typer.Option("--small", help="The size that the config's own section `small` asks for.")]
Data = Annotated[str | None, typer.Option(help="Folder of data sets, looked in before the Hub is asked.")]
EVAL_WORDS = "tasks: perplexity, humaneval, mbpp, race-high, race-middle, gsm8k, a JSONL file, or lm-eval's names."


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"forerun {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Anything of the form a.b=c overrides the configuration, e.g. engine.capacity=4096 model.dtype=bfloat16.")
def generate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT] [a.b=c ...]", help="PROMPT - reads stdin.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt, as an option; - reads stdin.")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file; its base variant generates.")] = None,
    model: Model = None,
    draft: Draft = None,
    method: Method = None,
    k: Length = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus: fewest tokens of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="This many most probable tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Tokens at least this probable, relative to the best.")] = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given more than once.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, streaming."""
    from forerun.verbs.generate import run

    sampling = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "max_new": max_tokens, "seed": seed,
        "stop": stop or None,
    }  # fmt: skip
    finish(run(words or [], prompt, config, model, draft, method, k, sampling, as_json=json, quiet=quiet))


@app.command(epilog="Anything of the form a.b=c overrides the configuration, e.g. engine.rows=8 workload.limit=4.")
def bench(
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [a.b=c ...]", help="CONFIG is a YAML file.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the results. Default: runs/bench-<time>.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what --out holds of finished variants; run the others.")
    ] = False,
    small: Small = False,
    data: Data = None,
    model: Model = None,
    draft: Draft = None,
    method: Method = None,
    k: Length = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    repeats: Annotated[int | None, typer.Option(help="Times that the workload is gone through.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each variant in a process of its own.")] = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods side by side on the same prompts; without CONFIG, all that ship on the embedded models."""
    from forerun.verbs.bench import run

    flags = {
        "model.path": model, "sampling.temperature": temperature, "sampling.max_new": max_tokens, "repeats": repeats,
    }  # fmt: skip
    finish(
        run(
            words or [],
            out,
            flags,
            {"path": draft, "k": k},
            method,
            overwrite=overwrite,
            resume=resume,
            small=small,
            data=data,
            memory=memory,
            as_json=json,
            quiet=quiet,
        )
    )


@app.command("eval", epilog="Example: forerun eval tasks=perplexity,humaneval,arc_easy limit=20 model.path=FOLDER")
def evaluate(
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] tasks=A,B [a.b=c ...]", help=EVAL_WORDS)] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the results. Default: runs/eval-<time>.")] = None,
    data: Data = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What the text is worth: perplexity, programs, multiple choice, mathematics, tasks of lm-evaluation-harness."""
    from forerun.verbs.evaluate import run

    finish(run(words or [], out, data=data, overwrite=overwrite, as_json=json, quiet=quiet))


@app.command(epilog="Example: forerun compress model.path=FOLDER recipes.0.kind=gptq recipes.0.bits=4 --out FOLDER-4bit")
def compress(
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [a.b=c ...]", help="CONFIG is a YAML file.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the compressed model.")] = None,
    floor: Annotated[str | None, typer.Option(help="Search the most that keeps a quality, e.g. race-high>=0.5.")] = None,
    axis: Annotated[str | None, typer.Option(help="What the search varies, e.g. recipes.0.fraction.")] = None,
    overwrite: Overwrite = False,
    small: Small = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize and prune a model, and save it; the same command resumes."""
    from forerun.verbs.compress import run

    finish(run(words or [], out, floor, axis, overwrite=overwrite, small=small, as_json=json, quiet=quiet))


@app.command(epilog="Example: forerun report runs/monday runs/tuesday")
def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Annotated[
        str | None, typer.Option(help="Folder for the report. One run: its own. Several: runs/report-<time>.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the reports of a finished run anew, or compare several runs."""
    from forerun.verbs.report import run

    finish(run(folders, out, as_json=json, quiet=quiet))


@app.command("vllm-args", epilog="Example: forerun vllm-args best.yaml")
def vllm_args(
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [a.b=c ...]", help="CONFIG is a YAML file.")] = None,
) -> None:
    """Print the `vllm serve` command line of a config."""
    from forerun.verbs.vllm_args import run

    finish(run(words or []))


@app.command(epilog="Example: forerun train eagle.yaml --out runs/eagle steps=2000. The same command resumes.")
def train(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="CONFIG [a.b=c ...]", help="YAML: kind is draft, medusa, mlp or eagle.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the run: checkpoints, log, what was trained.")] = "runs/train",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a draft or a head for a target, on text or on what the target itself writes."""
    from forerun.verbs.train import run

    finish(run(words or [], out, as_json=json, quiet=quiet))


audits = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="Is it lossless? A verdict, the evidence, and exit status 0 (lossless), 1 (not) or 3 (could not be decided).",
)  # fmt: skip
app.add_typer(audits, name="audit")
Words = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [a.b=c ...]", help="CONFIG is a YAML file.")]


@audits.command("rule", epilog="Example: forerun audit rule typical rule.epsilon=0.1")
def audit_rule(
    name: Annotated[str, typer.Argument(help="A rule's kind, or import with rule.path=module:Name.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="The rule's parameters.")] = None,
    json: Json = False,
) -> None:
    """An acceptance rule, by exact enumeration."""
    from forerun.verbs import audit

    finish(audit.rule(name, words or [], as_json=json))


@audits.command("engine")
def audit_engine(
    words: Words = None,
    tokens: Annotated[int | None, typer.Option(help="To sample; fewer are faster and see less.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A config's whole pipeline (drafter, rule, cache, batch, backend), on a model small enough to know its law."""
    from forerun.verbs import audit

    finish(audit.engine(words or [], tokens, as_json=json, quiet=quiet))


@audits.command("divergence")
def audit_divergence(words: Words = None, json: Json = False, quiet: Quiet = False) -> None:
    """Where a config's greedy output leaves plain decoding's: tie, numerics or bug, replayed in float32."""
    from forerun.verbs import audit

    finish(audit.divergence(words or [], as_json=json, quiet=quiet))


@audits.command("endpoint")
def audit_endpoint(
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server, such as http://localhost:8000/v1.")],
    against: Annotated[str, typer.Option(help="The server to compare with, without speculation.")],
    model: Annotated[str | None, typer.Option(help="Name of the model. Default: the server's only one.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Text file, one prompt a line. Default: those that ship.")] = None,
    samples: Annotated[int | None, typer.Option(help="Drawn completions a server; more see smaller differences.")] = None,
    tokens: Annotated[int | None, typer.Option(help="First tokens whose law is compared.")] = None,
    temperature: Temperature = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight at each server.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one request may take.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Two servers, with and without speculation: same law of the first tokens, same greedy text?"""
    from forerun.verbs import audit

    options = {"model": model, "samples": samples, "tokens": tokens, "temperature": temperature}
    options |= {"concurrency": concurrency, "timeout_s": timeout}
    finish(audit.endpoint(url, against, prompts, options, as_json=json, quiet=quiet))


def finish(status: int) -> None:
    raise typer.Exit(status)


def run(arguments: Sequence[str], application: Callable[..., Any] = app) -> int:
    """Run a command line and return its exit status; what the user can mend is one line on stderr and status 2."""
    try:
        return int(application(list(arguments), prog_name="forerun", standalone_mode=False) or 0)
    except UserError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # a folder that is a file, no permission, no space
            return complain(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        # Mistakes on the command line; the library's own class for them has changed its place between versions.
        if (describe := getattr(error, "format_message", None)) is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(describe(), file=sys.stderr)
            return 2
        return complain(describe() or "say what to do; see forerun --help")


def complain(message: str) -> int:
    print(f"forerun: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main() -> None:
    """The console script `forerun`."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
