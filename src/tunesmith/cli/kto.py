"""`tunesmith kto`: a recipe for answers that are good or bad to a trained model."""

from tunesmith.cli.train import command_of

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

kto = command_of("kto", "Train a model on answers that are good or bad.")
