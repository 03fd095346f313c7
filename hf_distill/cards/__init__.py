"""The model card of a distilled model: what was done and what was measured, and nothing else."""

from hf_distill.cards.check import check_card
from hf_distill.cards.data import Dataset, DistillationCard, Loss, Table, installed_versions, is_hub_id
from hf_distill.cards.folder import check_folder
from hf_distill.cards.hub import Pushed, push_distilled
from hf_distill.cards.render import card_metadata, draw_plots, regenerate_card, render_card, write_card


__all__ = [
    "Dataset",
    "DistillationCard",
    "Loss",
    "Pushed",
    "Table",
    "card_metadata",
    "check_card",
    "check_folder",
    "draw_plots",
    "installed_versions",
    "is_hub_id",
    "push_distilled",
    "regenerate_card",
    "render_card",
    "write_card",
]
