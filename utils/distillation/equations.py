# SPDX-License-Identifier: Apache-2.0
"""The loss of a run in words and equations, as its flags set it; what `utils.distillation.losses` computes."""

from collections.abc import Collection

COARSE = {"l1": "mean |b1 - 1| + mean |b0|", "l2": "mean (b1 - 1)^2 + mean b0^2"}
FINE_WEIGHT = {
    "adaptive": "1 - min(1, mean |b1 - 1| + mean |b0|)",
    "constant": "1",
    "linear": "step / steps",
    "cosine": "(1 - cos(pi * step / steps)) / 2",
}
CONVENTIONAL = {
    "mse": "mean (e_S - e_T)^2",
    "l1": "mean |e_S - e_T|",
    "huber": "mean huber(e_S - e_T)",
    "log": "mean over samples of log(mean (e_S - e_T)^2)",
}
BALANCE = "(M / m)^{:g} in [1/20, 20]; m, M: running means of what it weighs, in the sample's 20th of time and in all"
FEATURE = {"constant": "feature", "linear": "(1 - step / steps) * feature"}  # its weight, by --feature_weighting
LINES = {  # elements that share a line b0 + b1 * e_S
    "error": "every {group_size} elements of a channel with similar |e_S - e_T|",
    "signed": "every {group_size} elements of a channel with similar e_S - e_T",
    "patch": "every square of {group_size} elements of a channel",
    "channel": "every channel of every sample",
    "sample": "every sample",
}
VARIANCE = {  # of denoisers that predict one: term of the log -> what it is, of `utils.backbones.variance`
    "variance": "KL(q(x_{t-1} | x_t, x_0) || p_S) in bits, -log p_S(x_0) at t = 0  (no gradient through e_S)",
    "output_variance": "KL(p_T || p_S) in bits, of Gaussians with one mean and the predicted variances",
}


def equations(args: dict, logged: Collection[str] = ()) -> tuple[list[str], str]:
    """The output loss line by line, none without one, and the weighted sum; `args` are the flags of either script,
    `logged` the names in its log, which has the variance where the denoiser predicts one."""
    task, output = args.get("task_balance", 0), args.get("timestep_balance", 0)
    feature = FEATURE[args.get("feature_weighting", "constant")]  # cards may be of older runs
    terms = {"lambda_task": "u * diffusion" if task else "diffusion", "lambda_kd_output": "output"}
    variance = []
    for flag, name in zip(terms, VARIANCE, strict=True):
        if name in logged and args[flag]:
            terms[flag] = f"({terms[flag]} + {name})"
            variance.append(f"{name} = {VARIANCE[name]}")
    terms["lambda_kd_feat"] = feature
    total = "loss   = " + " + ".join(f"{args[flag]:g} * {term}" for flag, term in terms.items() if args[flag])
    balance = [f"u      = {BALANCE.format(task)}"] if task and args["lambda_task"] else []
    if args["lambda_kd_feat"] and (sigma := args.get("feature_mask_sigma", 0)):
        balance.append(f"feature: 0 in the place of entries beyond {sigma:g} standard deviations, of each model's own")
    if not args["lambda_kd_output"]:
        return [*balance, *variance], total
    balance += [f"v      = {BALANCE.format(output)}"] if output else []
    mean = "mean v * " if output else "mean "
    if args.get("output_loss", "lift") != "lift":
        distance = CONVENTIONAL[args["output_loss"]]
        return [*balance, f"output = {distance.replace('mean ', mean, 1)}", *variance], total
    elements = LINES[args.get("grouping") or args["coefficients"]].format(**args)
    scale = "" if args["coarse_scale"] == 1 else f"{args['coarse_scale']:g} * "
    lines = [
        f"e_T ~ b0 + b1 * e_S by least squares, one line for {elements}",
        "b1     = cov(e_S, e_T) / var(e_S),  b0 = mean(e_T) - b1 * mean(e_S)",
        f"coarse = {COARSE[args['coarse_norm']]}  (gradient through b0 and b1)",
        *balance,
        f"fine   = {mean}(b0 + b1 * e_S - e_T)^2  (b0 and b1 detached)",
        f"w      = {FINE_WEIGHT[args['weighting']]}",
        f"output = {scale}coarse + w * fine",
        *variance,
    ]
    return lines, total
