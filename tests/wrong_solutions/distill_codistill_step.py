"""Answers to `distill-codistill-step`."""

import copy

import torch
from bank import right, wrong


def hear(teacher, input_ids):
    """[batch, tokens, vocab]: the teacher as it should be asked."""
    mode = teacher.training
    teacher.eval()
    with torch.no_grad():
        logits = teacher(input_ids)
    teacher.train(mode)
    return logits


def learn_from(logits, students, optimizers, input_ids, target_ids, learn, token_loss):
    """[students]: each takes a step."""
    losses = []
    for student, optimizer in zip(students, optimizers, strict=True):
        loss = token_loss(student(input_ids)[learn], logits[learn], target_ids[learn]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def refuse_nothing(learn):
    if not learn.any():
        raise ValueError("nothing to learn in this batch")


def good(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    refuse_nothing(learn)
    logits = hear(teacher, input_ids)
    return learn_from(logits, students, optimizers, input_ids, target_ids, learn, token_loss)


def with_loss(loss_of_student, backward_of=lambda loss: loss):
    """A step with another way to a student's loss: (student's logits, teacher's, targets, learn, token_loss)."""

    def step(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
        refuse_nothing(learn)
        logits = hear(teacher, input_ids)
        losses = []
        for student, optimizer in zip(students, optimizers, strict=True):
            loss = loss_of_student(student(input_ids), logits, target_ids, learn, token_loss)
            optimizer.zero_grad()
            backward_of(loss).backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def with_teacher(ask):
    """A step with another way to the teacher's logits."""

    def step(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
        refuse_nothing(learn)
        logits = ask(teacher, input_ids)
        return learn_from(logits, students, optimizers, input_ids, target_ids, learn, token_loss)

    return step


@right
def by_autograd_grad(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    """Gradients asked for by name, of all students at a time, and every row through the loss before the choice."""
    count = int(learn.sum())
    if count == 0:
        raise ValueError("learn has no True")
    modes = {module: module.training for module in teacher.modules()}
    try:
        with torch.inference_mode():
            words = teacher.eval()(input_ids).flatten(0, 1)
    finally:
        for module, mode in modes.items():
            module.training = mode
    chosen = learn.flatten().float() / count
    total = [token_loss(student(input_ids).flatten(0, 1), words, target_ids.flatten()) @ chosen for student in students]
    weights = [list(student.parameters()) for student in students]
    grads = iter(torch.autograd.grad(sum(total), [weight for own in weights for weight in own]))
    for own, optimizer in zip(weights, optimizers, strict=True):
        for weight in own:
            weight.grad = next(grads)
        optimizer.step()
    return torch.stack(total).detach()


@right
def one_backward(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    refuse_nothing(learn)
    teacher_TV, target_T = hear(teacher, input_ids)[learn], target_ids[learn]
    losses = torch.stack([token_loss(student(input_ids)[learn], teacher_TV, target_T).mean() for student in students])
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)
    losses.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return losses.detach()


in_parts = right(good)


@wrong("not written")
def stub(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    raise NotImplementedError()


@wrong("raises")
def not_gathered(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    teacher_logits = hear(teacher, input_ids)
    return torch.stack([token_loss(student(input_ids), teacher_logits, target_ids).mean() for student in students])


@wrong("raises")
def flat_ids(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    teacher_TV = hear(teacher, input_ids.flatten())
    return torch.stack([token_loss(s(input_ids.flatten()), teacher_TV, target_ids.flatten()).mean() for s in students])


@wrong("type")
def a_list(*arguments):
    return good(*arguments).tolist()


@wrong("shape")
def one_number(*arguments):
    return good(*arguments).mean()


@wrong("changes its input")
def ignored_in_place(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    losses = good(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)
    target_ids[~learn] = -100
    return losses


# The loss.
@wrong("every token")
def mask_ignored(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    return good(teacher, students, optimizers, input_ids, target_ids, torch.ones_like(learn), token_loss)


zeros_in_the_mean = wrong("divided by all tokens")(
    with_loss(lambda z, u, target, learn, f: f(z[learn], u[learn], target[learn]).sum() / learn.numel())
)
a_sum = wrong("a sum")(with_loss(lambda z, u, target, learn, f: f(z[learn], u[learn], target[learn]).sum()))
mean_of_means = wrong("mean of the rows' means")(
    with_loss(
        lambda z, u, target, learn, f: torch.stack(
            [f(z[b][row], u[b][row], target[b][row]).mean() for b, row in enumerate(learn) if row.any()]
        ).mean()
    )
)
swapped = wrong("teacher and student swapped")(
    with_loss(lambda z, u, target, learn, f: f(u[learn], z[learn], target[learn]).mean())
)
shifted_once_more = wrong("shifted once more")(
    with_loss(
        lambda z, u, target, learn, f: f(
            z[:, :-1][learn[:, 1:]], u[:, :-1][learn[:, 1:]], target[:, 1:][learn[:, 1:]]
        ).mean()
    )
)


@wrong("each student has its mean loss over the tokens to be learned")
def rows_of_the_input(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    return good(teacher, students, optimizers, input_ids, input_ids, learn, token_loss)


@wrong("each student has its mean loss over the tokens to be learned")
def student_taught_by_itself(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    step = with_loss(lambda z, u, target, learn, f: f(z[learn], z[learn].detach(), target[learn]).mean())
    return step(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)


@wrong("context lost")
def learned_tokens_alone(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    alone = input_ids[learn][None]
    everything = torch.ones_like(alone, dtype=torch.bool)
    return good(teacher, students, optimizers, alone, target_ids[learn][None], everything, token_loss)


@wrong("teacher in training mode")
def mode_not_looked_at(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    with torch.no_grad():
        logits = teacher(input_ids)
    return learn_from(logits, students, optimizers, input_ids, target_ids, learn, token_loss)


@wrong("students in eval mode")
def all_in_eval_mode(teacher, students, *arguments):
    for student in students:
        student.eval()
    return good(teacher, students, *arguments)


@wrong("divided among the students")
def share_of_the_loss(teacher, students, *arguments):
    step = with_loss(lambda z, u, target, learn, f: f(z[learn], u[learn], target[learn]).mean() / len(students))
    return step(teacher, students, *arguments)


@wrong("running total")
def total_so_far(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    losses = good(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)
    return losses.cumsum(0)


@wrong("taught by the student before")
def a_chain_of_teachers(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    refuse_nothing(learn)
    heard, losses = hear(teacher, input_ids), []
    for student in students:
        logits = student(input_ids)
        losses.append(token_loss(logits[learn], heard[learn], target_ids[learn]).mean())
        heard = logits
    for optimizer in optimizers:
        optimizer.zero_grad()
    sum(losses).backward()
    for optimizer in optimizers:
        optimizer.step()
    return torch.stack(losses).detach()


@wrong("each student has its mean loss over the tokens to be learned")
def softer_for_each_student(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    """What the first student does to the teacher's logits, the second one gets."""
    logits = hear(teacher, input_ids)

    def loss(z, u, target, learn, f):
        return f(z[learn], logits.div_(2)[learn], target[learn]).mean()

    return with_loss(loss)(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)


# The students' step.
def loop(before=None, after=None, finish=None):
    """A step with another order of what a student and its optimizer do."""

    def step(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
        refuse_nothing(learn)
        logits, losses = hear(teacher, input_ids), []
        for student, optimizer in zip(students, optimizers, strict=True):
            loss = token_loss(student(input_ids)[learn], logits[learn], target_ids[learn]).mean()
            losses.append(loss)
            before and before(optimizer, optimizers)
            loss.backward()
            after and after(optimizer, optimizers)
        finish and finish(optimizers)
        return torch.stack(losses).detach()

    return step


def clear(optimizer, optimizers):
    optimizer.zero_grad()


def go(optimizer, optimizers):
    optimizer.step()


cleared_before_the_step = wrong("nobody moved")(loop(after=lambda one, all: (one.zero_grad(), one.step())))
no_step = wrong("nobody moved")(loop(before=clear))
not_cleared = wrong("old gradients")(loop(after=go))
cleared_afterwards = wrong("old gradients")(loop(after=lambda one, all: (one.step(), one.zero_grad())))
only_the_last = wrong("only the last one moved")(loop(before=clear, finish=lambda all: all[-1].step()))
only_the_first = wrong("each student takes one step, by its own gradient")(
    loop(before=clear, finish=lambda all: all[0].step())
)
two_steps = wrong("two steps")(loop(before=clear, after=lambda one, all: (one.step(), one.step())))
mean_backward = wrong("divided among the students")(
    lambda teacher, students, *arguments: with_loss(
        lambda z, u, target, learn, f: f(z[learn], u[learn], target[learn]).mean(), lambda loss: loss / len(students)
    )(teacher, students, *arguments)
)


@wrong("one step for each round")
def everyone_steps_in_each_round(teacher, students, optimizers, *arguments):
    for optimizer in optimizers:
        optimizer.zero_grad()
    return loop(after=lambda one, all: [optimizer.step() for optimizer in all])(
        teacher, students, optimizers, *arguments
    )


@wrong("each student takes one step, by its own gradient")
def uphill(teacher, students, optimizers, *arguments):
    step = with_loss(lambda z, u, target, learn, f: f(z[learn], u[learn], target[learn]).mean(), torch.neg)
    return step(teacher, students, optimizers, *arguments)


# The teacher.
@wrong("a teacher for each student")
def teacher_in_the_loop(teacher, students, optimizers, *arguments):
    pairs = zip(students, optimizers, strict=True)
    return torch.cat([good(teacher, [student], [optimizer], *arguments) for student, optimizer in pairs])


@wrong("the teacher runs once, and each student once")
def a_copy_of_the_teacher(teacher, *arguments):
    return good(copy.deepcopy(teacher), *arguments)


@wrong("no gradient reaches the teacher")
def teacher_learns_too(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    refuse_nothing(learn)
    mode = teacher.training
    logits = teacher.eval()(input_ids)
    teacher.train(mode)
    losses = []
    for student, optimizer in zip(students, optimizers, strict=True):
        loss = token_loss(student(input_ids)[learn], logits[learn], target_ids[learn]).mean()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@wrong("teacher's gradients cleared")
def wiped_away(teacher, *arguments):
    losses = teacher_learns_too(teacher, *arguments)
    teacher.zero_grad()
    return losses


def detached(teacher, input_ids):
    mode = teacher.training
    logits = teacher.eval()(input_ids).detach()
    teacher.train(mode)
    return logits


cut_off_afterwards = wrong("the teacher runs without a graph")(with_teacher(detached))


@wrong("the teacher's weights are what they were")
def follows_the_first_student(teacher, students, *arguments):
    losses = good(teacher, students, *arguments)
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), students[0].parameters(), strict=True):
            mine.lerp_(theirs, 0.01)
    return losses


@torch.no_grad()
def left_in_eval_mode(teacher, input_ids):
    return teacher.eval()(input_ids)


@torch.no_grad()
def always_back_to_training(teacher, input_ids):
    logits = teacher.eval()(input_ids)
    teacher.train()
    return logits


mode_forgotten = wrong("the teacher is in the mode it came in")(with_teacher(left_in_eval_mode))
training_in_the_end = wrong("a teacher in eval mode stays there")(with_teacher(always_back_to_training))


@wrong("the teacher can still be trained by others")
def frozen_for_good(teacher, *arguments):
    teacher.requires_grad_(False)
    return good(teacher, *arguments)


@wrong("the losses hold no graph")
def losses_with_their_graphs(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    refuse_nothing(learn)
    logits, losses = hear(teacher, input_ids), []
    for student, optimizer in zip(students, optimizers, strict=True):
        losses.append(token_loss(student(input_ids)[learn], logits[learn], target_ids[learn]).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses)


# Few, and none.
@wrong("the loss is right for one student and one token")
def variance_among_students(teacher, students, *arguments):
    losses = good(teacher, students, *arguments)
    variance = (losses - losses.mean()).square().sum() / torch.tensor(len(losses) - 1)
    return losses + 0 * variance


@wrong("and so is the step")
def slower_if_alone(teacher, students, *arguments):
    """The first student's gradient weighs nothing if there is no second one."""
    share = (len(students) - 1) / max(len(students) - 1, 1)
    step = with_loss(lambda z, u, t, learn, f: f(z[learn], u[learn], t[learn]).mean(), lambda loss: loss * share)
    return step(teacher, students, *arguments)


@wrong("raises")
def squeezed(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    """One token to learn, and its axis is gone."""
    step = with_loss(lambda z, u, target, learn, f: f(z[learn].squeeze(), u[learn].squeeze(), target[learn]).mean())
    return step(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)


@wrong("a batch with nothing to learn is refused")
def mean_of_nothing(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    logits = hear(teacher, input_ids)
    return learn_from(logits, students, optimizers, input_ids, target_ids, learn, token_loss)


@wrong("a batch with nothing to learn is refused")
def zero_for_nothing(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    return good(teacher, students, optimizers, input_ids, target_ids, learn, token_loss) if learn.any() else 0.0


@wrong("another error")
def asserts(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    assert learn.any(), "nothing to learn"
    return good(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)


@wrong("before any model has run")
def notices_too_late(teacher, students, optimizers, input_ids, target_ids, learn, token_loss):
    losses = mean_of_nothing(teacher, students, optimizers, input_ids, target_ids, learn, token_loss)
    if losses.isnan().any():
        raise ValueError("a loss is NaN")
    return losses


EQUIVALENT = {
    "list[torch.nn.Module]  ->  list": "an annotation computes nothing at all",
    "True  ->  False": "students and optimizers are as many as each other",
    "zip(students, optimizers, strict=True)  ->  zip(students, optimizers)": (
        "students and optimizers are as many as each other"
    ),
}
