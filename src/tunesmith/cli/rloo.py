"""`tunesmith rloo`: a recipe for rewards of answers to a trained model."""

from tunesmith.cli.train import command_of

HELP = """Train a model on rewards of its own answers, each compared with the mean of the others (RLOO).

The same as [cyan]tunesmith train[/cyan] with [cyan]trainer: rloo[/cyan] in the recipe. Rows have a
[cyan]prompt[/cyan], and columns for the rewards, such as [cyan]answer[/cyan].

[bold]tunesmith rloo --model runs/sft --data questions.jsonl --reward-funcs exact_match --output runs/rloo[/bold]

The settings used most, beside those of [cyan]tunesmith train[/cyan]:

\b
[cyan]--reward-funcs[/cyan]     exact_match, number, regex, json_schema ..., module:function, file.py:function
[cyan]--reward-weights[/cyan]   the weight of each of several
[cyan]--num-generations[/cyan]  answers to each prompt (2)
[cyan]--max-completion-length[/cyan]  most tokens of an answer (512)
[cyan]--beta[/cyan]             what moving away from the reference costs (0.05)
"""

rloo = command_of("rloo", "Train a model on rewards of its answers, leave-one-out.")
