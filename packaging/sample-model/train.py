"""Trains the embedded sample model from nothing but drawn sprites, and writes it where the package looks.

Three networks: an autoencoder (VAE), then text encoder and UNet together on its latents; at last the
autoencoder learns empty backgrounds. Every random number comes from the seed and the step, so an
interrupted training continues from its last checkpoint as if nothing had happened. Needs torch, diffusers
and transformers, and a CPU.

    python packaging/sample-model/train.py --work /tmp/sample-model
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from sprites import BACKGROUNDS, COLOURS, OBJECTS, contact_sheet, draw, draw_background, draw_sprite
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from wording import MAX_TOKENS, build_tokenizer, random_prompt

from studio_worker.gpu_check.tiny import compvis

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "studio_worker" / "sample_model"
HELD_OUT_FILE = HERE / "held-out.json"

Combination = tuple[str, str, str]  # colour, object, background
Size = tuple[int, int]  # width, height in pixels

HELD_OUT_SHARE = 0.2
EMPTY_PROMPT_SHARE = 0.12  # what guidance is steered away from
TEXT_WIDTH = 96
SIDE = 64
# How many pictures of each size, and how often a batch is made of them. One sprite fills any size.
SIZES: dict[Size, tuple[int, float]] = {
    (64, 64): (24000, 0.78),
    (96, 64): (2000, 0.05),
    (64, 96): (2000, 0.05),
    (96, 96): (2500, 0.07),
    (128, 128): (1500, 0.05),
}
LATENT_NOISE = 0.08  # in latent standard deviations: what the decoder learns to forgive
ENCODER_LOGVAR = -7.0  # the encoder's own spread, about 0.03 of a latent's


def all_combinations() -> list[Combination]:
    return [(colour, thing, ground) for colour in COLOURS for thing in OBJECTS for ground in BACKGROUNDS]


def split_combinations(seed: int) -> tuple[list[Combination], list[Combination]]:
    """The combinations to train on, and those never drawn for training."""
    everything = all_combinations()
    order = np.random.default_rng(seed).permutation(len(everything))
    cut = round(len(everything) * HELD_OUT_SHARE)
    return [everything[i] for i in sorted(order[cut:])], [everything[i] for i in sorted(order[:cut])]


class Pictures:
    """Drawn pictures of one size with their combinations; images is uint8 (n, height, width, 3)."""

    def __init__(self, seed: int, size: Size, count: int, combinations: list[Combination]) -> None:
        rng = np.random.default_rng([seed, *size])
        chosen = rng.integers(0, len(combinations), count)
        self.labels = [combinations[int(i)] for i in chosen]
        self.images = np.stack([np.asarray(draw(rng, *label, size=size)) for label in self.labels])

    def batch(self, indices: np.ndarray[Any, Any]) -> Tensor:
        """The pictures as float (n, 3, height, width) in -1..1."""
        return torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_vae() -> AutoencoderKL:
    """A quarter of the picture's side, four channels: three levels keep thin outlines crisp."""
    return AutoencoderKL(
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
    )


def new_unet() -> UNet2DConditionModel:
    """Two levels, 16x16 and 8x8 at the home size; text is read at the lower one."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 104),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; velocity prediction and trailing steps keep flat colours true."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def cosine_rate(step: int, steps: int, warmup: int = 150) -> float:
    """Share of the peak learning rate: a short linear rise, then half a cosine down to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Training:
    """The loop all stages share: learning rate, progress lines, checkpoints, resuming."""

    def __init__(
        self,
        work: Path,
        name: str,
        modules: dict[str, nn.Module],
        steps: int,
        peak_rate: float,
        average: bool = False,
    ) -> None:
        self._file = work / f"{name}.pt"
        self._name, self._steps, self._peak = name, steps, peak_rate
        self._modules = modules
        parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01)
        self._parameters = parameters
        self.averaged = (
            {key: copy.deepcopy(m).requires_grad_(False) for key, m in modules.items()} if average else {}
        )
        self.step, self.seconds = 0, 0.0
        if self._file.exists():
            saved = torch.load(self._file, weights_only=True)
            for key, module in [*modules.items(), *((f"average.{k}", m) for k, m in self.averaged.items())]:
                module.load_state_dict(saved["modules"][key])
            self._optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds = saved["step"], saved["seconds"]

    def _save(self) -> None:
        named = {**self._modules, **{f"average.{k}": m for k, m in self.averaged.items()}}
        part = self._file.with_suffix(".part")
        torch.save(
            {
                "modules": {key: m.state_dict() for key, m in named.items()},
                "step": self.step,
                "optimizer": self._optimizer.state_dict(),
                "seconds": self.seconds,
            },
            part,
        )
        part.replace(self._file)

    def run(self, loss_of_step: Callable[[int], Tensor], every: int = 100) -> None:
        """Train until the last step; loss_of_step draws its own batch from the step's number."""
        began, before = time.monotonic(), self.seconds
        recent: list[float] = []
        while self.step < self._steps:
            for group in self._optimizer.param_groups:
                group["lr"] = self._peak * cosine_rate(self.step, self._steps)
            loss = loss_of_step(self.step)
            self._optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self.step += 1
            recent.append(float(loss.detach()))
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, averaged in self.averaged.items():
                    torch._foreach_lerp_(
                        list(averaged.parameters()), list(self._modules[key].parameters()), 1 - decay
                    )
            self.seconds = before + time.monotonic() - began
            if self.step % every == 0 or self.step == self._steps:
                print(
                    f"{self._name} step {self.step}/{self._steps} loss {np.mean(recent):.4f} "
                    f"{self.seconds / 60:.1f} min",
                    flush=True,
                )
                recent.clear()
                self._save()


def step_rng(seed: int, stage: int, step: int) -> np.random.Generator:
    """This step's random numbers, the same after a resume; torch's generator is set along with them."""
    torch.manual_seed(seed * 1_000_003 + stage * 100_000_007 + step)
    return np.random.default_rng([seed, stage, step])


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Difference of pixels and of their steps to the right and below: the latter keep edges sharp."""
    loss = F.l1_loss(made, wanted) + F.mse_loss(made, wanted)
    for axis in (-1, -2):
        loss = loss + 0.5 * F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis))
    return loss


def crops(rng: np.random.Generator, pools: dict[Size, Pictures], count: int) -> Tensor:
    """64x64 pieces: mostly whole home-size pictures, some cut out of larger ones."""
    size = (SIDE, SIDE) if rng.random() < 0.7 else list(pools)[int(rng.integers(1, len(pools)))]
    pool = pools[size]
    pictures = pool.batch(rng.integers(0, len(pool.labels), count))
    left, top = (int(rng.integers(0, side - SIDE + 1)) for side in size)
    return pictures[:, :, top : top + SIDE, left : left + SIDE]


def train_vae(work: Path, seed: int, pools: dict[Size, Pictures], steps: int) -> tuple[AutoencoderKL, float]:
    """The autoencoder, its latents with mean 0, spread 1 and no correlation; and the seconds it took."""
    torch.manual_seed(seed)
    vae = new_vae()
    training = Training(work, "vae", {"vae": vae}, steps, peak_rate=2e-3)

    def loss_of_step(step: int) -> Tensor:
        pictures = crops(step_rng(seed, 1, step), pools, 12)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pictures).latent_dist.mean
            spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True)
            # No noise at first: a decoder that has learnt nothing yet would only learn to average it away.
            noise = torch.randn(latents.shape) * spread * LATENT_NOISE * min(1.0, 4 * step / steps)
            made = vae.decode(latents + noise).sample
        scale: Tensor = 1e-5 * latents.float().square().mean()
        return picture_loss(made.float(), pictures) + scale

    training.run(loss_of_step)
    whiten(vae, pools[(SIDE, SIDE)])
    return vae, training.seconds


@torch.no_grad()
def whiten(vae: AutoencoderKL, pool: Pictures) -> None:
    """Fold a change of latent basis into the 1x1 convolutions on either side of the latents."""
    samples = torch.cat(
        [vae.encode(pool.batch(np.arange(i, i + 100))).latent_dist.mean for i in range(0, 2000, 100)]
    )
    flat = samples.permute(1, 0, 2, 3).reshape(samples.shape[1], -1).double()
    mean = flat.mean(dim=1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = (vectors @ torch.diag(values.rsqrt()) @ vectors.T).float()
    backward = (vectors @ torch.diag(values.sqrt()) @ vectors.T).float()
    offset = mean.float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(offset)
    quant.weight[:channels] = torch.einsum("ij,jkxy->ikxy", forward, quant.weight[:channels])
    quant.bias[:channels] = forward @ (quant.bias[:channels] - offset)
    quant.weight[channels:] = 0
    quant.bias[channels:] = ENCODER_LOGVAR
    post.bias += post.weight[:, :, 0, 0] @ offset
    post.weight.copy_(torch.einsum("ijxy,jk->ikxy", post.weight, backward))


def with_and_without(rng: np.random.Generator, labels: list[Combination]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, the same without their sprites (both -1..1), and where in the latents no sprite reaches."""
    full, empty, covered = [], [], []
    for colour, thing, ground in labels:
        background = draw_background(rng, ground, (SIDE, SIDE))
        sprite = draw_sprite(rng, colour, thing, (SIDE, SIDE))
        coverage = sprite.getchannel("A")
        picture = background.copy()
        picture.paste(sprite, mask=coverage)
        full.append(np.asarray(picture))
        empty.append(np.asarray(background))
        covered.append(np.asarray(coverage))
    pictures = torch.from_numpy(np.stack(full + empty)).permute(0, 3, 1, 2).float() / 127.5 - 1
    near = F.max_pool2d(torch.from_numpy(np.stack(covered))[:, None].float(), 4)
    free = F.max_pool2d(near, 3, stride=1, padding=1) == 0
    return pictures[: len(labels)], pictures[len(labels) :], free


def settle_vae(
    work: Path, seed: int, vae: AutoencoderKL, combinations: list[Combination], steps: int
) -> float:
    """Teach the autoencoder empty backgrounds, which inpainting starts from. Returns seconds.

    Group normalization makes an empty picture look unlike any with a sprite. Its latents are drawn to those
    the same ground has around a sprite, and all others are held where the UNet knows them.
    """
    known = copy.deepcopy(vae).requires_grad_(False)
    training = Training(work, "settled", {"vae": vae}, steps, peak_rate=5e-4)

    def loss_of_step(step: int) -> Tensor:
        rng = step_rng(seed, 3, step)
        labels = [combinations[int(i)] for i in rng.integers(0, len(combinations), 8)]
        full, empty, free = with_and_without(rng, labels)
        pictures = torch.cat([full, empty])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = known.encode(full).latent_dist.mean.float()
            latents = vae.encode(pictures).latent_dist.mean
            made = vae.decode(latents + torch.randn(latents.shape) * LATENT_NOISE).sample
        of_full, of_empty = latents.float().chunk(2)
        away: Tensor = F.mse_loss(of_full, wanted) + ((of_empty - wanted).square() * free).mean()
        return picture_loss(made.float(), pictures) + away

    training.run(loss_of_step)
    return training.seconds


@torch.no_grad()
def encode_pools(vae: AutoencoderKL, pools: dict[Size, Pictures]) -> dict[Size, Tensor]:
    """Every picture's latents, (n, 4, height / 4, width / 4)."""
    encoded: dict[Size, Tensor] = {}
    for size, pool in pools.items():
        parts = np.array_split(np.arange(len(pool.labels)), len(pool.labels) // 50)
        with torch.autocast("cpu", torch.bfloat16):
            latents = [vae.encode(pool.batch(part)).latent_dist.mean for part in parts]
        encoded[size] = torch.cat(latents).float()
    return encoded


def train_unet(
    work: Path,
    seed: int,
    vae: AutoencoderKL,
    pools: dict[Size, Pictures],
    tokenizer: CLIPTokenizer,
    steps: int,
    batch: int,
) -> tuple[UNet2DConditionModel, CLIPTextModel, float]:
    """UNet and text encoder (their running averages), and the seconds they took."""
    torch.manual_seed(seed + 1)
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    training = Training(
        work, "unet", {"unet": unet, "text": text_encoder}, steps, peak_rate=1.5e-3, average=True
    )
    latents_of = encode_pools(vae, pools) if training.step < steps else {}
    scheduler = new_scheduler()
    sizes, odds = list(SIZES), [share for _, share in SIZES.values()]

    def loss_of_step(step: int) -> Tensor:
        rng = step_rng(seed, 2, step)
        size = sizes[int(rng.choice(len(sizes), p=odds))]
        count = max(8, round(batch * SIDE * SIDE / (size[0] * size[1])))
        chosen = rng.integers(0, len(pools[size].labels), count)
        prompts = [
            "" if rng.random() < EMPTY_PROMPT_SHARE else random_prompt(rng, *pools[size].labels[i])
            for i in chosen
        ]
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents = latents_of[size][torch.from_numpy(chosen)]
        noise = torch.randn(latents.shape)
        # One time from each slice of the schedule: the same coverage with less luck in it.
        slices = (torch.arange(count) + torch.rand(count)) / count
        times = (slices * 1000).long().clamp(max=999)
        noisy = scheduler.add_noise(latents, noise, times)
        wanted = scheduler.get_velocity(latents, noise, times)
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(tokens).last_hidden_state
            made = unet(noisy, times, text).sample
        return F.mse_loss(made.float(), wanted)

    training.run(loss_of_step)
    return training.averaged["unet"], training.averaged["text"], training.seconds


def write_package(
    vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer: CLIPTokenizer, target: Path
) -> Path:
    """The weights in one file and the configuration folder; returns the weights' path."""
    config = target / "config"
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_config(config)
    for part in ("vae", "unet"):
        getattr(pipe, part).save_config(config / part)
    pipe.scheduler.save_pretrained(config / "scheduler")
    pipe.text_encoder.config.save_pretrained(config / "text_encoder")
    tokenizer.save_pretrained(config / "tokenizer")
    weights = target / "sample.safetensors"
    state = compvis.single_file(unet.state_dict(), vae.state_dict(), text_encoder.state_dict(), vae_levels=3)
    save_file(state, weights, metadata={"format": "pt", "license": "MIT"})
    weights.chmod(0o644)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    constants = target / "__init__.py"
    if constants.exists():
        text = constants.read_text(encoding="utf-8")
        constants.write_text(
            re.sub(r'(SHA256: Final\[str\] = )"\w+"', rf'\g<1>"{digest}"', text), encoding="utf-8"
        )
    return weights


def parts_report(**parts: nn.Module) -> Iterator[str]:
    for name, module in parts.items():
        yield f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} million parameters"


@torch.no_grad()
def reconstruction_sheet(vae: AutoencoderKL, pool: Pictures) -> Image.Image:
    """Drawn pictures above what the autoencoder makes of them."""
    drawn = pool.batch(np.arange(24))
    both = torch.cat([drawn, vae.decode(vae.encode(drawn).latent_dist.mode()).sample.clamp(-1, 1)])
    arrays = ((both + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return contact_sheet([Image.fromarray(array) for array in arrays], columns=12, enlarge=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints; continued if not empty"
    )
    parser.add_argument("--target", type=Path, default=PACKAGE, help="where the finished model goes")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--vae-steps", type=int, default=4500, help="batches of 12 pictures")
    parser.add_argument("--unet-steps", type=int, default=4000)
    parser.add_argument("--settle-steps", type=int, default=300, help="batches of 8 pairs, VAE only")
    parser.add_argument("--batch", type=int, default=48, help="UNet batch at 64x64, fewer if larger")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # small activations otherwise slow the text encoder several times over
    options.work.mkdir(parents=True, exist_ok=True)

    trained_on, held_out = split_combinations(options.seed)
    HELD_OUT_FILE.write_text(
        json.dumps(held_out, separators=(",", ":")).replace("],[", "],\n[") + "\n", encoding="utf-8"
    )
    began = time.monotonic()
    pools = {size: Pictures(options.seed, size, count, trained_on) for size, (count, _) in SIZES.items()}
    count = sum(len(pool.labels) for pool in pools.values())
    print(f"drew {count} pictures in {time.monotonic() - began:.0f} s", flush=True)

    tokenizer = build_tokenizer()
    vae, vae_seconds = train_vae(options.work, options.seed, pools, options.vae_steps)
    reconstruction_sheet(vae, pools[(SIDE, SIDE)]).save(options.work / "reconstruction.png")
    unet, text_encoder, unet_seconds = train_unet(
        options.work, options.seed, vae, pools, tokenizer, options.unet_steps, options.batch
    )
    settle_seconds = settle_vae(options.work, options.seed, vae, trained_on, options.settle_steps)
    weights = write_package(vae, unet, text_encoder, tokenizer, options.target)
    for line in parts_report(vae=vae, unet=unet, text_encoder=text_encoder):
        print(line)
    print(
        f"{weights}: {weights.stat().st_size / 1e6:.2f} MB; trained for "
        f"{(vae_seconds + unet_seconds + settle_seconds) / 60:.0f} minutes "
        f"(VAE {vae_seconds / 60:.0f}, UNet {unet_seconds / 60:.0f}, settling {settle_seconds / 60:.0f})"
    )


if __name__ == "__main__":
    main()
