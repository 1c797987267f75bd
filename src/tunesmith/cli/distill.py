"""`tunesmith distill`: a recipe for a student and its teacher to a trained model."""

from tunesmith.cli.train import command_of

HELP = """Train a model to predict what its teacher predicts (distillation).

The same as [cyan]tunesmith train[/cyan] with [cyan]trainer: distill[/cyan] in the recipe. Rows are prompts with
answers. The teacher is a larger model with the same vocabulary.

[bold]tunesmith distill --model Qwen/Qwen3-0.6B --teacher-model-name-or-path Qwen/Qwen3-4B --data rows.jsonl
--lmbda 0 --teacher-top-k 32 --output runs/distilled[/bold]

The settings used most, beside those of [cyan]tunesmith train[/cyan]:

\b
[cyan]--teacher-model-name-or-path[/cyan]  the teacher
[cyan]--lmbda[/cyan]        the share of answers that the student writes itself (1); 0 takes those of the data
[cyan]--teacher-top-k[/cyan]  ask the teacher once, before training, and keep its likeliest tokens
[cyan]--beta[/cyan]         0: KL(teacher || student), 1: KL(student || teacher) (1)
[cyan]--temperature[/cyan]  of answers that are written, and of the distributions (1)
[cyan]--supervised-weight[/cyan]  the share of cross-entropy in the loss of the data's answers (0)
"""

distill = command_of("distill", "Train a model to predict what its teacher predicts.")
