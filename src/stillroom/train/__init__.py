"""The loop, which knows no method: roles, turns, stages, checkpoints, run folders, products."""

from stillroom.train.product import load, load_product, product_hash, save_product
from stillroom.train.recipe import Average, Product, Recipe, Ref, Role, Stage, mean_backward, nothing, parts_of
from stillroom.train.run import fit, make_plan, read_run, resume, start
from stillroom.train.turn import Turn
from stillroom.train.watch import Lines, Silent, Watch

__all__ = [
    "Average", "Lines", "Product", "Recipe", "Ref", "Role", "Silent", "Stage", "Turn", "Watch", "fit", "load",
    "load_product", "make_plan", "mean_backward", "nothing", "parts_of", "product_hash", "read_run", "resume",
    "save_product", "start",
]
