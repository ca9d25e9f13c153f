"""DMVAE's matching stage: what is saved by decoding on the steps alone that move the codec, what the gap costs beside
its two networks, and the memory of a fake score that is an adapter.

Operations are those that torch counts (multiplications of products and convolutions); the speed-up that they foretell
takes every operation to cost the same.
"""

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from compare import bench, interleave, row
from stillroom.codecs import Codec
from stillroom.data import LatentSpace, Photos, Tensors
from stillroom.flows import Denoiser, Flow
from stillroom.nets.coding import Decoder, Encoder, sized
from stillroom.paths import Linear
from stillroom.recipes import dmvae
from stillroom.recipes._shaping import ByScores
from stillroom.settings import from_mapping
from stillroom.train import Product, Silent, save_product
from stillroom.train.run import prepared
from stillroom.train.turn import Noise
from stillroom.train.world import open_world

EVERY, SIZE, BATCH = 5, 64, 16
SHARE = 0.9             # of the foretold speed-up
NETS = {"score_net": {"width": 192, "depth": 6}}
LORA_BOUND = 0.6


class Always(dmvae.DMVAE):
    """As released: every step decodes, and most throw the pictures away."""

    def losses(self, batch, turn):
        found = super().losses(batch, turn)
        if "codec" not in turn:
            x = batch["data"].x
            self.drawn_terms(x, self.codec.encode(x), turn, "codec")
        return found


def tokenizer(place: Path) -> Path:
    """Untrained: nothing here looks at what it answers."""
    encoder = sized(1_000_000, lambda w: Encoder(16, w, (1, 3, 3, 3)))
    decoder = sized(2_000_000, lambda w: Decoder(16, w, (3, 3, 3, 1), soft_clamp=False))
    codec = Codec(encoder, decoder, LatentSpace(16, 8, (0.0,) * 16, (1.0,) * 16, encoder.offset))
    save_product(Product("codec", {"codec": codec}), place)
    return place


class Unchecked:
    def check(self, batch):
        """An untrained tokenizer would be refused."""


class Skips(Unchecked, dmvae.DMVAE):
    pass


class Decodes(Unchecked, Always):
    pass


def settings(place: Path, codec: Path, **more: Any):
    values = {"out": str(place), "data": "", "size": SIZE, "codec": str(codec), "reference": "gaussian", "batch": BATCH,
              "every": EVERY, "fake_steps": 0, "decoder_steps": 0, "perceptual": 0.0, "precision": "float32"}
    return from_mapping(dmvae.Settings, values | NETS | more, "bench")


def operations(trainer, batch, due: bool) -> int:
    """Of one step, in which the codec takes its turn or does not."""
    trainer.step = EVERY - 1 if due else 0
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(batch)
    return counter.get_total_flops()


def skipping(place: Path, quick: bool) -> tuple[list[dict], list[str]]:
    codec, x = tokenizer(place / "codec"), Photos(SIZE).fetch(range(256), 0).x
    with open_world("cpu") as world:
        chosen = settings(place / "run", codec)
        with (prepared(Skips, chosen, {"data": Tensors(x)}, None, Silent(), world) as skips,
              prepared(Decodes, chosen, {"data": Tensors(x)}, None, Silent(), world) as decodes,
              skips.loaders({}) as loaders):
            batch = skips.device_batch({"data": loaders["data"].at(0)})
            counted = {t: [operations(t, batch, due) for due in (False, True)] for t in (skips, decodes)}
            once = {t: (EVERY - 1) * other + due for t, (other, due) in counted.items()}
            foretold = once[decodes] / once[skips]

            def round_of(trainer) -> None:
                trainer.step = 0
                for _ in range(EVERY):
                    trainer.train_step(batch)
                    trainer.step += 1

            samples = interleave({"decodes": lambda: round_of(decodes), "skips": lambda: round_of(skips)},
                                 3 if quick else 15)
            gap_rows = gap(cast(ByScores, cast(dmvae.DMVAE, skips.recipe).shaped), skips, quick)
    bound = 1 + SHARE * (foretold - 1)
    return [
        row(f"{EVERY} steps that decode each time", samples["decodes"]),
        row("the same where one decodes", samples["skips"], ("decoding", samples["decodes"]), above=bound,
            inverse=True),
        *gap_rows,
    ], [f"Operations foretell {foretold:.3f} times the speed; the bound is {SHARE:.0%} of what that saves."]


def gap(shaped: ByScores, trainer, quick: bool) -> list[dict]:
    """The pull at latents, forward and backward, against the two evaluations that it cannot do without."""
    z = torch.randn(BATCH, 16, SIZE // 8, SIZE // 8, requires_grad=True)
    turn = trainer.make_turn(0, frozenset(("codec", "fake")), Noise(0, 0, trainer.world.device), None)
    fake, times = shaped.guided_fake, torch.rand(BATCH)
    twin = dmvae.flows.make_net(trainer.settings.score_net, tuple(z.shape[1:]), None)

    def both() -> None:
        with torch.no_grad():
            fake(z, times)
            twin(z, times)

    shaped.real = type(fake)(twin, fake.path, "v")      # a network, as of a trained reference: a closed form costs less

    def pull() -> None:
        turn._draws = 0
        shaped.pulls(z, None, turn).mean().backward()

    samples = interleave({"both": both, "pull": pull}, 3 if quick else 31)
    return [row("two evaluations of the score networks", samples["both"]),
            row("the pull at latents, forward and backward", samples["pull"], ("two evaluations", samples["both"]),
                below=1.05)]


def memory_of(lora: bool, place: Path) -> int:
    """Bytes of weights, gradients and moments of one step's roles, and of the reference."""
    codec = place / "codec"
    flow = dmvae.flows.make_net(from_mapping(dmvae.ScoreNet, {"width": 384, "depth": 8}, "bench"), (16, 8, 8), None)
    save_product(Product("flow", {"flow": Flow(Denoiser(flow, Linear(), "v"), (16, 8, 8))}), place / f"flow-{lora}")
    x = Photos(SIZE).fetch(range(64), 0).x
    recipe = type("Unjudged", (Skips,), {"flow_of": lambda self, name: dmvae.open_teacher(name)})
    with open_world("cpu") as world:
        chosen = settings(place / f"run-{lora}", codec, reference=str(place / f"flow-{lora}"), fake="lora" if lora else
                          "full", every=1)
        with (prepared(recipe, chosen, {"data": Tensors(x)}, None, Silent(), world) as trainer,
              trainer.loaders({}) as loaders):
            trainer.train_step(trainer.device_batch({"data": loaders["data"].at(0)}))
            kept = {id(t): t for t in trainer.recipe.reference.state_dict().values()}      # pyright: ignore
            for learner in trainer.learners.values():
                state = [v for s in learner.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
                grads = [torch.empty_like(p) for p in learner.parameters.values()]
                kept |= {id(t): t for t in [*state, *grads, *learner.role.module.state_dict().values()]}
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values()}
            return sum(storages.values())


def memory() -> str:
    with tempfile.TemporaryDirectory() as place:
        tokenizer(Path(place) / "codec")
        full, lora = (memory_of(lora, Path(place)) / 1e6 for lora in (False, True))
    met = "met" if lora < LORA_BOUND * full else "missed"
    return (f"Weights, gradients and moments of reference, fake score and tokenizer (3M, with a DiT of width 384 and "
            f"depth 8 as reference): {full:.0f} MB with a copy as the fake score, {lora:.0f} MB with adapters of rank "
            f"16: {lora / full:.2f} of it; bound {LORA_BOUND}: {met}.")


def run(quick: bool) -> tuple[list[dict], list[str]]:
    with tempfile.TemporaryDirectory() as place:
        rows, notes = skipping(Path(place), quick)
    return rows, [*notes, memory()]


if __name__ == "__main__":
    bench("DMVAE: a round of its matching stage, the gap beside its networks, memory", run)
