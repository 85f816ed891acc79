# SPDX-License-Identifier: Apache-2.0
"""Distil a smaller diffusion model with PLACE.

    accelerate launch train_place.py                  # the embedded default, @assets/default.args: 3 to 13 minutes
    accelerate launch train_place.py --pretrained_model_name_or_path google/ddpm-celebahq-256 --dataset_name FOLDER \\
        --pruning_ratio 0.5 --use_ema --output_dir student

PLACE (Han, Yeo, Yoo, CVPR 2026) sorts the elements of every sample and channel by their error, cuts them into groups,
and in every group fits the teacher's prediction as a line of the student's: the line is aligned first, the residual
after. The conventional baselines are settings of train_lift.py.

Left out on purpose: training that shards a model over GPUs (FSDP, DeepSpeed), and fp8.
"""

import math
from argparse import Namespace
from pathlib import Path

from utils.command_line import run, start
from utils.training.arguments import parse_args


def add_method_arguments(group) -> None:
    """The flags of this script alone."""
    group.add_argument(
        "--group_size",
        type=int,
        default=16,
        help="elements that share a line, from 2 to those of a channel (default: 16, the paper's; 1 has no slope)",
    )
    group.add_argument(
        "--grouping",
        choices=["error", "signed", "patch"],
        default="error",
        help="what a group shares: error (its size) is the paper's PLACE; signed (with its sign) did better in our "
        "study and is the embedded default's; patch (a square) is an ablation",
    )


def method_name(args) -> str:
    """What the model card calls the method."""
    parts = ["diffusion loss"] if args.lambda_task else []
    if args.lambda_kd_output:
        parts.append(f"PLACE ({args.grouping} groups of {args.group_size})")
    return " + ".join(parts + ["feature distillation"] * (args.lambda_kd_feat > 0))


if __name__ == "__main__":  # --help and wrong flags do not wait for what is imported below
    ARGS = start(parse_args, __doc__, add_method_arguments)

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from utils.backbones import choose_backbone
from utils.data.cache import encoded_once, open_dataset
from utils.data.rows import sample_batch, training_batches
from utils.devices import apply_speed_flags, use_cpu_threads
from utils.distillation.balance import TimestepBalance
from utils.distillation.features import feature_loss, feature_weight, tap_pair
from utils.distillation.losses import fine_weight, place_loss
from utils.distributed import on_main_process, process_settings, refuse_unsupported
from utils.output_dir import check_output_dir, lock_output_dir, prepare_output_dir, unlock_output_dir
from utils.publishing.card import write_card
from utils.publishing.html_report import write_report
from utils.publishing.hub import check_push, prepare_push, push
from utils.training.checkpoint import Checkpoints
from utils.training.log import RunLog, error_per_sample, tracker_names
from utils.training.memory import memory_estimate
from utils.training.optimizer import ema_warmup, make_optimizer, stepped, with_gradients
from utils.training.report import plan, save_arguments, summary
from utils.training.schedules import count_steps, make_lr_scheduler
from utils.training.stop import Stop
from utils.training.validation import Validation, evaluated


def main(args: Namespace) -> None:
    """Train, validate, save: in the order of the lines."""
    refuse_unsupported(args)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=tracker_names(args.report_to),
        project_dir=args.output_dir,
        kwargs_handlers=process_settings(),
    )
    use_cpu_threads(args, accelerator)
    on_main_process(accelerator, check_output_dir, args.output_dir)

    # Teacher: frozen, in eval mode, never prepared
    backbone = choose_backbone(args).load(args)
    teacher = backbone.teacher
    distil = args.lambda_kd_output > 0 or args.lambda_kd_feat > 0

    # Data
    dataset = open_dataset(args, accelerator, backbone)
    count_steps(args, len(dataset), accelerator.num_processes)  # of --num_train_epochs

    # Student: float32, one module with its feature projectors
    real_images = sample_batch(dataset, backbone.images_for_student(args), args.seed, accelerator.device)
    denoiser, sizes = backbone.make_student(args, real_images)
    pairs = backbone.feature_pairs(denoiser) if args.lambda_kd_feat > 0 else []
    student, tapped_teacher = tap_pair(denoiser, teacher, pairs, backbone.example(), args.seed)
    apply_speed_flags(args, accelerator, denoiser, teacher)

    # Optimizer and schedule, both in optimizer steps
    optimizer = make_optimizer(args, with_gradients(student), accelerator)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    memory = on_main_process(accelerator, memory_estimate, args, accelerator, student, tapped_teacher, backbone)
    student, optimizer = accelerator.prepare(student, optimizer)  # the schedule stays: prepared, it counts processes
    ema_weights = with_gradients(denoiser)  # collected once, not in every step
    ema = EMAModel(ema_weights, decay=args.ema_decay, foreach=True, **ema_warmup(args)) if args.use_ema else None

    # Everything that can be refused has been by the end of this paragraph; nothing is written before it
    validation = Validation(args, accelerator, backbone, denoiser, dataset)
    on_main_process(accelerator, check_push, args)
    accelerator.print(plan(args, accelerator, dataset, sizes, memory))
    if args.dry_run:
        return
    repo_id = on_main_process(accelerator, prepare_push, args)  # None without --push_to_hub, too

    # Where everything goes, and where it goes on from
    on_main_process(accelerator, lock_output_dir, args.output_dir)
    prepare_output_dir(args, accelerator)
    log = RunLog(args, accelerator, backbone.process.num_places)
    dataset = encoded_once(args, accelerator, dataset, backbone)  # with --latent_cache_dir
    powers = {"task": args.task_balance, "output": args.timestep_balance}
    balance = TimestepBalance(powers, backbone.process.num_places, accelerator.device, total=accelerator.reduce)
    checkpoints = Checkpoints(
        args,
        accelerator,
        student=student,
        ema=ema,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        log=log,
        validation=validation,
        balance=balance,
        fingerprint=dataset.fingerprint(),
    )
    step = checkpoints.resume()
    if accelerator.is_main_process:
        save_arguments(args, __file__, dataset.fingerprint())
    micro_steps = args.gradient_accumulation_steps
    batches = training_batches(
        dataset, args, accelerator, first=step * micro_steps, last=args.max_train_steps * micro_steps
    )

    stop = Stop(args.max_train_minutes, accelerator)
    log.start(step)
    for batch, rng in batches:
        with accelerator.accumulate(student):
            clean, condition = backbone.encode(batch, rng)  # x_0 (B, C, *S), the denoiser's keywords
            noised = backbone.add_noise(clean, rng)  # x_t and its target (B, C, *S), place and time (B,)

            student_pred = backbone.predict(student, noised, condition)  # output (B, C, *S), features [(B, C_i, *S_i)]
            weighted = noised.weighted(balance.weight("task", noised.place))  # as it is without --task_balance
            terms, target = backbone.task_terms(student_pred, weighted), noised.target  # {name: ()}
            errors = {"task": error_per_sample(student_pred.output, target)}  # (B,), unweighted
            loss = args.lambda_task * sum(terms.values())
            if distil:
                progress = step / args.max_train_steps  # of the run
                with torch.no_grad():
                    teacher_pred = backbone.predict(tapped_teacher, noised, condition)
                target = teacher_pred.output
                output = place_loss(
                    student_pred.output,
                    teacher_pred.output,
                    group_size=args.group_size,
                    grouping=args.grouping,
                    coarse_norm=args.coarse_norm,
                    coarse_scale=args.coarse_scale,
                    weight=fine_weight(args.weighting, progress),
                    sample_weight=balance.weight("output", noised.place),
                )
                errors["output"] = output.error
                more = backbone.distillation_terms(student_pred, teacher_pred, noised)
                feature = feature_loss(student_pred.features, teacher_pred.features, args.feature_mask_sigma)
                lambda_kd_feat = args.lambda_kd_feat * feature_weight(args.feature_weighting, progress)
                loss = loss + args.lambda_kd_output * sum(more.values(), output.loss) + lambda_kd_feat * feature
                terms |= {"feature": feature, **output.terms(), **more}

            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        balance.add(noised.place, errors)
        log.add(step + 1, {"loss": loss, **terms}, noised.place, error_per_sample(student_pred.output, target))
        if not accelerator.sync_gradients:
            continue

        step += 1
        balance.end_step()
        if stepped(accelerator, grad_norm):  # fp16 skips a step whose gradient overflows
            lr_scheduler.step()
            if ema is not None:
                ema.step(ema_weights)
        log.end_step(step, grad_norm, lr_scheduler.get_last_lr()[0])
        last = step == args.max_train_steps
        if last or step % args.validation_steps == 0:
            with log.paused(), evaluated(denoiser, ema):
                log.write(step, validation.run(denoiser, step))
        if last or step % args.checkpointing_steps == 0:
            with log.paused():
                checkpoints.save(step)
        stop.exit_if_asked(checkpoints, step)
    stop.restore_handlers()

    # Export: the weights first, then what takes time or may fail
    if accelerator.is_main_process:
        with evaluated(denoiser, ema):
            backbone.save(denoiser, Path(args.output_dir))
        validation.measure_references()
        write_card(args, backbone, validation, method=method_name(args), sizes=sizes)
        write_report(Path(args.output_dir))
    accelerator.end_training()
    unlock_output_dir(args.output_dir)
    accelerator.print(summary(args, log, validation, dataset))
    if repo_id:
        push(args.output_dir, repo_id)


if __name__ == "__main__":
    run(main, ARGS)
