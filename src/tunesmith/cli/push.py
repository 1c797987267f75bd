"""`tunesmith push`: a run to the hub, with its card."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.complete import runs
from tunesmith.terminal.output import finish_lines, note

if TYPE_CHECKING:
    from tunesmith.ship.hub import Plan


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.", autocompletion=runs)],
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository; made when it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private; a public one is refused.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="The branch, made when it is missing.")] = "main",
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="The licence, such as apache-2.0; unset, the base model's."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The base model on the hub, where the run names a folder.")
    ] = None,
    no_samples: Annotated[bool, typer.Option("--no-samples", help="Show no prompts and answers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and ask nobody.")] = False,
) -> None:
    """Upload a run to the Hugging Face hub, with a card.

    Goes on where an interrupted upload stopped. Log in first: `hf auth login`, or set HF_TOKEN.
    Example: tunesmith push runs/first --repo me/first --private
    """
    from tunesmith.ship.hub import MESSAGE, PushOptions
    from tunesmith.ship.hub import plan as plan_push
    from tunesmith.ship.hub import push as push_run

    options = PushOptions(
        private=private,
        revision=revision,
        message=MESSAGE if message is None else message,
        licence=licence,
        base_model=base_model,
        samples=not no_samples,
    )
    if dry_run:
        planned = plan_push(run, repo, options)
        finish_lines(_as_json(planned) | {"sent": False}, [*_lines(planned), "a dry run: nothing was sent"])
        return
    report = push_run(run, repo, options, progress=note)
    removed = [f"removed {name}, which an earlier push left" for name in report.removed]
    sent = {"sent": True, "url": report.url, "commit": report.commit, "removed": report.removed}
    finish_lines(_as_json(report.plan) | sent, [*_lines(report.plan), *removed, f"pushed to {report.url}"])


def _as_json(plan: "Plan") -> dict[str, Any]:
    files = [{"path": item.path, "bytes": item.size} for item in plan.items]
    return {"repo": plan.repo, "bytes": plan.size, "files": files, "not_sent": plan.left_out, "notes": plan.notes}


def _lines(plan: "Plan") -> list[str]:
    """Each file with its size, the total, and what stays here."""
    width = max(len(f"{item.size:,}") for item in plan.items)
    lines = [f"{item.size:>{width},} bytes  {item.path}" for item in plan.items]
    lines.append(f"{plan.size:>{width},} bytes in {len(plan.items)} files for {plan.repo}")
    if plan.left_out:
        lines.append(f"not sent: {', '.join(plan.left_out)}")
    return lines + [f"note: {text}" for text in plan.notes]
