"""`tunesmith grpo`: a recipe for rewards of answers to a trained model."""

from tunesmith.cli.train import command_of

HELP = """Train a model on rewards of its own answers, compared with others to the same prompt (GRPO and its kin).

The same as [cyan]tunesmith train[/cyan] with [cyan]trainer: grpo[/cyan] in the recipe. Rows have a
[cyan]prompt[/cyan], and columns for the rewards, such as [cyan]answer[/cyan].

[bold]tunesmith grpo --model runs/sft --data questions.jsonl --reward-funcs exact_match --output runs/grpo[/bold]

The settings used most, beside those of [cyan]tunesmith train[/cyan]:

\b
[cyan]--reward-funcs[/cyan]     exact_match, number, regex, json_schema ..., module:function, file.py:function
[cyan]--reward-weights[/cyan]   the weight of each of several
[cyan]--num-generations[/cyan]  answers to each prompt (8)
[cyan]--max-completion-length[/cyan]  most tokens of an answer (512)
[cyan]--loss-type[/cyan]        dapo, grpo, dr_grpo, cispo ...
[cyan]--beta[/cyan]             how close to stay to the reference (0)
"""

grpo = command_of("grpo", "Train a model on rewards of its answers, by groups.")
