"""Work in forked processes that kill themselves with SIGKILL at a moment that a number repeats."""

from __future__ import annotations

import os
import signal
import sys
import traceback


class Calls:
    """For ``sys.setprofile``: counts calls in Python and C, and kills its process at one.

    Attributes:
        count: Calls so far.
        windows: Of each phase, the counts between which its functions ran.
    """

    def __init__(self, kill_at=None, phases=None):
        phases = phases or {}
        self.count, self.kill_at = 0, kill_at
        self.inside = {f.__code__: phase for phase, fs in phases.items() for f in fs}
        self.windows, self.open = {phase: [] for phase in phases}, {}

    def __call__(self, frame, event, argument):
        if event == "call" or event == "c_call":
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "call" and frame.f_code in self.inside:
            self.open[frame] = self.count
        elif event == "return" and frame in self.open:
            self.windows[self.inside[frame.f_code]].append((self.open.pop(frame), self.count))


def ended(work, calls=None):
    """Whether ``work()`` ran to its end in a forked process, and was not killed.

    Args:
        work: What to do; if it raises, the traceback is printed and an assertion fails here.
        calls: Watches the work.
    """
    child = os.fork()
    if child == 0:
        try:
            sys.setprofile(calls)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return False
    assert os.WEXITSTATUS(status) == 0, "the work failed, see above"
    return True
