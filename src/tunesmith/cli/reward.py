"""`tunesmith reward`: a recipe for pairs of answers to a model that scores answers."""

from tunesmith.cli.train import command_of

HELP = """Train a reward model on pairs of answers: it scores the better one higher.

The same as [cyan]tunesmith train[/cyan] with [cyan]trainer: reward[/cyan] in the recipe. Rows have
[cyan]chosen[/cyan] and [cyan]rejected[/cyan], with or without [cyan]prompt[/cyan]. A language model gets a new head
with one output; a sequence classifier is trained further.

[bold]tunesmith reward --model runs/sft --data pairs.jsonl --lora --output runs/reward[/bold]

The settings used most, beside those of [cyan]tunesmith train[/cyan]:

\b
[cyan]--center-rewards-coefficient[/cyan]  keep rewards around 0 (such as 0.01)
[cyan]--max-length[/cyan]   most tokens of a prompt with one answer (1024)
"""

reward = command_of("reward", "Train a model that scores answers.")
