"""``rankloom limits``: which attention heads nearly linear gradients would serve, and what training did to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli import options
from rankloom.cli.output import emit, pairs, table

if TYPE_CHECKING:
    from rankloom.attention.report import HeadReport, Report
    from rankloom.attention.trial import Need

__all__ = ["app"]

app = typer.Typer(help="Where attention may be approximated, measured head by head.", no_args_is_help=True)


@app.command("probe")
def probe(
    model: options.Model = None,
    data: options.Data = None,
    lengths: Annotated[
        str, typer.Option(help="Numbers of tokens to judge, separated by commas.")
    ] = "2048,32768,131072",
    eps: Annotated[float, typer.Option(help="Relative error allowed in the output and in dQ, dK and dV.")] = 1e-2,
    adapter: Annotated[
        str | None, typer.Option(help="Output folder of `rankloom train`, or an adapter's folder.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Leave the adapter out, to see what it changed.")] = False,
    samples: Annotated[int, typer.Option(help="Texts: fitted to the first, judged on the others.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 2048,
    task: options.Task = None,
    dtype: options.Dtype = None,
    figure: Annotated[str | None, typer.Option(help="Write a figure: .svg, .png or .pdf.")] = None,
    force: options.Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    json: options.Json = False,
) -> None:
    """Measure every head's norms, logits and trial fits, and say at which length an approximation pays on this machine.

    rankloom limits probe --model smollm2-135m --data pydoc-topics --lengths 2048,32768 --eps 1e-2

    rankloom limits probe --adapter runs/latest --json > after.json
    """
    asked = _lengths(lengths)
    path = _figure(figure) if figure is not None else None
    from rankloom.attention.probe import probe as measure
    from rankloom.training.excerpts import excerpts
    from rankloom.training.progress import say_to_stderr
    from rankloom.training.restore import restore

    say = (lambda _line: None) if quiet else say_to_stderr
    given = {"model": model, "data": data, "task": task, "dtype": dtype}
    restored = restore(adapter, options=given, force=force, base=base, say=say)
    batches = excerpts(restored, tokens=tokens, samples=samples, say=say)
    report = measure(restored.loaded.model, batches, lengths=asked, eps=eps, name=restored.config.model, progress=say)
    if path is not None:
        from rankloom.attention.figure import draw

        draw(report, path)
    if json:
        emit(report.to_dict())
    else:
        _print(report)


@app.command("compare")
def compare(
    before: Annotated[str, typer.Argument(help="`rankloom limits probe --json` before.")],
    after: Annotated[str, typer.Argument(help="The same after, with the same settings.")],
    json: options.Json = False,
) -> None:
    """Say how far heads moved between two probes: over and under the threshold, to and from an approximation.

    rankloom limits compare before.json after.json
    """
    from dataclasses import asdict

    from rankloom.attention.report import compare as difference

    comparison = difference(_read(before), _read(after))
    summary = comparison.summary()
    if json:
        emit({"summary": summary, "heads": [asdict(change) for change in comparison.changes]})
        return
    columns = ["layer", "head", "B", "", "R", "", "std", "", *(f"at {length:,}" for length in comparison.lengths)]
    rows = [
        [c.layer, c.head, *c.bound, *c.logit_range, *c.logit_std, *(" -> ".join(pair) for pair in c.verdicts.values())]
        for c in comparison.changes
    ]
    table(columns, rows)
    print()
    pairs(
        {
            f"{length:,} tokens": f"{n['rose']} heads rose over sqrt(log L), {n['fell']} fell below; "
            f"{n['lost']} lost their approximation, {n['gained']} gained one"
            for length, n in summary.items()
        }
    )


def _print(report: Report) -> None:
    columns = ["layer", "head", "B_q", "B_k", "B_v", "R", "std", "d_eff", "degree", "features", "cheapest", "from L"]
    table([*columns, *(f"{length:,}" for length in report.lengths)], [_row(head, report) for head in report.heads])
    print()
    for length in report.lengths:
        below = sum(head.below(length) for head in report.heads)
        counts, output = (
            ", ".join(f"{count} {verdict}" for verdict, count in report.count(length, output=only).items())
            for only in (False, True)
        )
        print(f"{length:,} tokens: {counts} (output alone: {output}); {below} of {len(report.heads)} below sqrt(log L)")
    print(f"eps {report.eps:g}, {report.machine}; degree and features: for the output / for gradients")
    for note in report.notes():
        print(note)


def _row(head: HeadReport, report: Report) -> list[object]:
    best, at = head.cheapest["gradients"], head.break_even["gradients"]
    return [
        head.layer,
        head.head,
        *head.bounds.values(),
        head.logit_range,
        head.logit_std,
        head.effective_dimension,
        _both(head.degree),
        _both(head.features),
        f"{best.kind} {best.width}" if best else "-",
        f"{at:,.0f}" if at is not None else "-",
        *(head.verdicts[length] for length in report.lengths),
    ]


def _both(values: Mapping[Need, int | None]) -> str:
    return " / ".join(
        "-" if value is None else f"{value:.3g}" if value > 10**6 else str(value) for value in values.values()
    )


def _lengths(text: str) -> list[int]:
    from rankloom.errors import RecipeError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"--lengths {text}: give numbers of tokens separated by commas, as in 2048,32768") from None


def _figure(name: str) -> Path:
    """Refused before anything is measured, as is a missing matplotlib."""
    from importlib import import_module

    from rankloom.errors import RecipeError

    path = Path(name)
    if path.suffix not in (".svg", ".png", ".pdf") or not path.parent.is_dir():
        raise RecipeError(f"--figure {name}: give a .svg, .png or .pdf file in a folder that exists")
    import_module("matplotlib")
    return path


def _read(name: str) -> Report:
    from json import JSONDecodeError, loads

    from rankloom.attention.report import Report
    from rankloom.errors import ArtifactError

    try:
        return Report.from_dict(loads(Path(name).read_text()))
    except (OSError, UnicodeDecodeError, JSONDecodeError) as error:
        raise ArtifactError(
            f"cannot read {name}: {error}; write one with: rankloom limits probe --json > FILE"
        ) from error
