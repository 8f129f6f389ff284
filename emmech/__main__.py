"""``python -m emmech``, which ``accelerate launch -m emmech`` runs in every process."""

from emmech.cli import main

main()
