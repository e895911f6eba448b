"""Why rows of published tables stand there as not run."""

GPT3 = "GPT-3's weights are not public"
DEBERTA = "there is no DeBERTa in the project"
