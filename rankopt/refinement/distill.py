"""From end to end: the dense model's distribution is the target (Hinton et al., 2015).

All factors learn at once, and learn what the predictions need: that is what they are measured by.
It takes the gradients and moments of all of them in memory.
"""

from rankopt.progress import bar
from rankopt.refinement.fit import Fit
from rankopt.refinement.job import Job, Outcome, learning
from rankopt.refinement.state import Saved


def distil(job: Job) -> Outcome:
    """Fit all parameters to the divergence; they end as the best state."""
    start = job.resumed().state
    with learning(job.parameters):
        fit = Fit(job.parameters, len(job.data.fitted), job.loss, job.held_out, job.recipe, start)
        with bar(range(fit.steps), "Distil", "step", job.progress) as shown:
            shown.update(fit.state.step)
            for step in fit.run():
                shown.update()
                due = job.checkpoint and (step % job.checkpoint.every == 0 or step == fit.steps)
                if job.checkpoint and due:
                    job.checkpoint.save(Saved(fit.saved()))
    state = fit.state
    return Outcome(state.before, state.best, state.step, frozenset(fit.seen()))
