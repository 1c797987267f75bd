"""`tunesmith kto`: a recipe for answers that are good or bad to a trained model."""

from typing import Annotated

import typer

from tunesmith.cli.train import Machines, NodeRank, Nodes, Rendezvous, begin, list_settings

HELP = """Train a model on answers that are good or bad, one for each prompt (KTO).

The same as [cyan]tunesmith train[/cyan] with [cyan]trainer: kto[/cyan] in the recipe. Rows have [cyan]prompt[/cyan]
and [cyan]completion[/cyan], or [cyan]messages[/cyan], and [cyan]label[/cyan]: true or false. The reference is the
model as training begins with it.

[bold]tunesmith kto --model runs/sft --data judged.jsonl --output runs/kto[/bold]

The settings used most, beside those of [cyan]tunesmith train[/cyan]:

\b
[cyan]--beta[/cyan]         how close to stay to the reference (0.1)
[cyan]--desirable-weight[/cyan]    the weight of good answers (1)
[cyan]--undesirable-weight[/cyan]  the weight of bad answers (1)
"""


def _list(wanted: bool) -> None:
    if wanted:
        list_settings("kto")


def kto(
    ctx: typer.Context,
    fields: Annotated[
        bool, typer.Option("--fields", callback=_list, is_eager=True, help="List all settings, and exit.")
    ] = False,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    rendezvous: Rendezvous = None,
) -> None:
    """Train a model on answers that are good or bad."""
    begin(ctx.args, Machines(nodes=nodes, node_rank=node_rank, rendezvous=rendezvous), trainer="kto")
