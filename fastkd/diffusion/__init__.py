"""Losses of few-step generators: tensors in, a loss out, whatever the network is. A sample lies whole in its process:
norms and means of samples are not summed over shards of them.

paths       parametrisations: TrigFlow, RectifiedFlow, EDM
network     a network and its tangent
continuous  continuous-time consistency: sCM, rCM, MeanFlow, AlphaFlow, FACM, TVM
discrete    consistency between two times, over segments, on frame differences; BOOT; velocity matching
matching    distribution matching: DMD, VSD, SDS, TDM, SiD, SIM
critics     what a fake network, a discriminator and a density ratio are trained and weighted with
"""

from fastkd.diffusion.continuous import (
    alphaflow_loss,
    facm_loss,
    meanflow_loss,
    rcm_loss,
    scm_loss,
    scm_tangents,
    tvm_loss,
)
from fastkd.diffusion.critics import (
    denoising_loss,
    density_ratio,
    discriminator_gan_loss,
    f_distill_weights,
    generator_gan_loss,
    phased_noise,
    ratio_by_time,
    tdm_weights,
    uni_instruct_weights,
)
from fastkd.diffusion.discrete import (
    boot_loss,
    consistency_loss,
    ddim_step,
    guided,
    segment_edge,
    u_shaped_times,
    velocity_distillation_loss,
    velocity_matching_loss,
)
from fastkd.diffusion.matching import (
    balanced_gradient,
    dmd_loss,
    gradient_loss,
    random_scales,
    sid_loss,
    sim_loss,
    tdm_loss,
    vsd_loss,
)
from fastkd.diffusion.network import network_jvp, tangent_warmup
from fastkd.diffusion.paths import EDM, PREDICTIONS, Path, RectifiedFlow, TrigFlow, transfer

__all__ = [
    "EDM",
    "PREDICTIONS",
    "Path",
    "RectifiedFlow",
    "TrigFlow",
    "alphaflow_loss",
    "balanced_gradient",
    "boot_loss",
    "consistency_loss",
    "ddim_step",
    "denoising_loss",
    "density_ratio",
    "discriminator_gan_loss",
    "dmd_loss",
    "f_distill_weights",
    "facm_loss",
    "generator_gan_loss",
    "gradient_loss",
    "guided",
    "meanflow_loss",
    "network_jvp",
    "phased_noise",
    "random_scales",
    "ratio_by_time",
    "rcm_loss",
    "scm_loss",
    "scm_tangents",
    "segment_edge",
    "sid_loss",
    "sim_loss",
    "tangent_warmup",
    "tdm_loss",
    "tdm_weights",
    "transfer",
    "tvm_loss",
    "u_shaped_times",
    "uni_instruct_weights",
    "velocity_distillation_loss",
    "velocity_matching_loss",
    "vsd_loss",
]
