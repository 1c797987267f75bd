"""`tunesmith dpo`: a recipe for pairs of answers to a trained model."""

from tunesmith.cli.train import command_of

HELP = """Train a model on pairs of answers, a better one and a worse one (DPO and its kin).

The same as [cyan]tunesmith train[/cyan] with [cyan]trainer: dpo[/cyan] in the recipe. Rows have [cyan]prompt[/cyan],
[cyan]chosen[/cyan] and [cyan]rejected[/cyan], or two whole conversations. The reference is the model as training
begins with it.

[bold]tunesmith dpo --model runs/sft --data pairs.jsonl --output runs/dpo[/bold]

The settings used most, beside those of [cyan]tunesmith train[/cyan]:

\b
[cyan]--loss-type[/cyan]    sigmoid (DPO), ipo, simpo, orpo ..., or several: sigmoid,sft
[cyan]--loss-weights[/cyan]  the weight of each of several
[cyan]--beta[/cyan]         how close to stay to the reference (0.1)
[cyan]--max-length[/cyan]   most tokens of a prompt with one answer (1024)
[cyan]--precompute-ref-log-probs[/cyan]  compute what the reference says once, before training
"""

dpo = command_of("dpo", "Train a model on pairs of answers.")
