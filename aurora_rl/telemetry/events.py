"""The events of a run's ``metrics.jsonl``: when each is written, and its fields.

The reference in the documentation is generated from this table, and a test compares it with the calls of
:meth:`aurora_rl.telemetry.log.MetricsLog.write`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One kind of line.

    Attributes:
        when: When the line is written.
        fields: Meaning of each field, by name. ``time``, ``source`` and ``event`` come first in every line.
    """

    when: str
    fields: dict[str, str]


_REASON = {"reason": "What happened, in words."}
_SEEN = {"seen": "Requests learned from so far.", "steps": "Optimizer steps so far."}

EVENTS: dict[str, Event] = {
    # Events of the inference server.
    "costs": Event(
        "The tree controller has timed rounds before serving.",
        {"round_ms": "Milliseconds of a round, by number of occupied slots and by depth x width."},
    ),
    "request": Event(
        "A request has completed.",
        {
            "request": "Number of the request.",
            "domain": "Domain of its prompt; empty if the prompt has none.",
            "prompt_tokens": "Tokens of the prompt.",
            "tokens": "Tokens of the completion.",
            "terminated": "True if it ended at a stop token, false at its token budget.",
            "speculative_tokens": "Tokens that speculative rounds delivered.",
            "speculative_rounds": "Rounds that were speculative.",
            "drafted_tokens": "Tokens that were drafted.",
            "accepted": "Rounds by number of accepted drafts.",
            "versions": "Versions of the weights that drafted it.",
            "depth": "Depth of the trees that were drafted when it ended.",
            "coverage": "Share of its tokens in the draft vocabulary; null with SGLang and vLLM.",
        },
    ),
    "requests": Event(
        "SGLang or vLLM has answered requests of its own clients since the last such line; only what was recorded is "
        "counted.",
        {
            "requests": "Requests.",
            "terminated": "Those that ended at a stop token, not at their token budget.",
            "prompt_tokens": "Tokens of their prompts.",
            "tokens": "Tokens of their completions.",
            "speculative_tokens": "Tokens that speculative rounds delivered.",
            "speculative_rounds": "Rounds that were speculative.",
            "drafted_tokens": "Tokens drafted for them.",
            "accepted": "Rounds by number of accepted drafts.",
        },
    ),
    "status": Event(
        "Every five seconds.",
        {
            "requests": "Completed requests.",
            "version": "Version of the weights that draft.",
            "acceptance_length": "Tokens per speculative round over the last tenth of the requests: eight at "
            "least, half at most.",
            "acceptance_by_position": "Share of the drafted rounds since then that accepted 1, 2, ... drafts.",
            "tokens_per_second": "Plain (baseline) and speculative throughput over the last quarter of the requests.",
            "speedup": "Speculative over plain; null if it was not measured, or over fewer than 96 plain rounds.",
            "baseline_rounds": "Plain rounds that were measured for it.",
            "break_even": "Acceptance length at which the rounds that drafted would have been as fast as plain ones, "
            "over the last quarter of the requests; null where the speedup is, and if nothing was drafted.",
            "drafted": "Rounds since the last status by what they drafted: tree, chain, ngrams, plain, baseline.",
            "depth": "Depth of the trees that are drafted.",
            "coverage": "Mean coverage of the requests since the last status.",
            "staleness": "Versions that were published after the one that drafts; null if that is not known.",
            "queue": "Trajectories that wait for the learner.",
            "dropped": "Trajectories lost so far, by reason. Given up here: no_learner while none was connected, "
            "slow_learner while one was, not_encodable, and too_large (for `wire.queue_bytes` or `wire.max_message`). "
            "Here or at the learner, before it was learned from: expired (older than `privacy.max_age`). Refused by "
            "the server's own learner: malformed, handshake (of another deployment) and invalid. Lost by it: "
            "buffer_full (its full buffer let go of what it had not learned from), and quarantined (no step could be "
            "taken on it). Lost with one that died: learner_died (sent to it, and in none of its training states).",
            "learner": "State of the learner.",
            "running": "Clients' requests that are decoded now; like the next two only with a front at `http.port`.",
            "waiting": "Clients' requests that wait.",
            "waits": "Mean seconds that clients waited since the last status, by what for: the names of the histograms "
            "of `GET /metrics` without their unit.",
        },
    ),
    "shape": Event(
        "The tree controller has changed the shape of the trees.",
        {
            "depth": "Longest path; 0 is plain decoding.",
            "width": "Most children of a node; 1 is a chain.",
            "nodes": "Most nodes of the tree; null keeps all.",
            "lookup_only": "True if lookup alone drafts.",
            "acceptance": "Expected acceptance by depth.",
            "occupied": "Occupied slots.",
        },
    ),
    "begin": Event(
        "The server begins; a run that was resumed has several.",
        {
            "traffic": "Requests of the traffic, 0 without; clients' requests are numbered from there on.",
            "unseen": "Requests of the traffic after which templates come that were not seen before; null if there are "
            "none.",
        },
    ),
    "swap": Event(
        "New weights draft from now on.",
        {
            "version": "Version of the weights.",
            "ms": "Milliseconds for which serving stood still.",
            "requests": "Completed requests.",
        },
    ),
    "swap_failed": Event(
        "The drafter could not load new weights, and the old ones go on.", {"version": "Version refused.", **_REASON}
    ),
    "compare": Event(
        "Two drafters are compared: `trial` and `verdict` follow, with the second in the place of new weights.",
        {"drafters": "The first, which is version 0, and the second, version 1, as `compare` names them."},
    ),
    "trial": Event(
        "New weights draft a share of the rounds from now on, in turns with those that are served.",
        {
            "version": "Version of the new weights.",
            "against": "Version that is served.",
            "requests": "Completed requests.",
        },
    ),
    "verdict": Event(
        "The trial of new weights has ended. `swap` follows if they were promoted.",
        {
            "version": "Version of the new weights.",
            "against": "Version that was served meanwhile.",
            "requests": "Completed requests.",
            "promote": "True if the new weights draft from now on, false if they were rolled back.",
            "reason": "What decided, in words.",
            "rounds": "Rounds of the trial.",
            "pairs": "Pairs of windows that were compared.",
            "acceptance_length": "Tokens per round and slot in these windows, of the old and of the new weights.",
            "tokens_per_second": "Throughput in them, of the old and of the new weights; null if the clock is too "
            "coarse to time them.",
            "evidence": "Evidence of a loss of either figure: 1 is none; weights are rolled back at 2 over "
            "`canary.false_alarm_rate`.",
        },
    ),
    "watchdog": Event(
        "The drafter that serves is not what was published.",
        {
            "version": "Version that drafted.",
            "cause": "corrupted: tensors are not those that were published. stale: they are those of an earlier "
            "version. mismatched: what is not published is not what it was. cache: it does not follow from the texts. "
            "dead: it drafts nothing.",
            "detail": "What was compared, and how it differs.",
            "action": "What was done.",
            "requests": "Completed requests.",
        },
    ),
    "drafter_fault": Event(
        "The drafter failed, and a request goes on without it.",
        {
            "request": "Number of the request; null before serving.",
            "version": "Version of the weights.",
            "fault": "What the drafter did.",
        },
    ),
    "attached": Event(
        "The plugin of an SGLang or vLLM server records for this run.", {"status": "Status of the plugin."}
    ),
    "unreachable": Event("The server of SGLang or vLLM, or its plugin, does not answer.", _REASON),
    "learner_restarted": Event(
        "A learner that had ended was started again.",
        {
            "restarts": "How often so far.",
            "resumed": "True if it goes on from a training state.",
            "missed": "Trajectories that were dropped so far while no learner was connected, of all outages and before "
            "the first. What waits in the queue for the next learner is not among them.",
            "lost": "Trajectories that were sent to the learner that died and are in none of its training states: on "
            "their way to it, received, held back by its gate, or learned from since it saved.",
        },
    ),
    "learner_died": Event("The server's learner has ended; serving goes on.", _REASON),
    "failed": Event("At the end of a run, for each request that was not served.", _REASON),
    # Events of the learner; both write `refused`.
    "refused": Event("Server and learner do not fit: another target, head, draft vocabulary or drafter.", _REASON),
    "learner_ready": Event("The learner listens.", {"pid": "Its process.", "seen": _SEEN["seen"]}),
    "resumed": Event(
        "The learner goes on from a training state.",
        {
            "state": "Its folder.",
            "skipped": "What is wrong with each newer state, which is broken.",
            "version": "Version under which what was served is published again; null if nothing was served.",
            "seen": _SEEN["seen"],
            "steps": _SEEN["steps"],
        },
    ),
    "gate_against": Event(
        "An engine serves weights of an earlier learner, or others than this one started from, and it did not resume.",
        {
            "engine": "What the engine calls itself.",
            "version": "Version that it serves.",
            "same": "True if the gate compares with these weights; else it compares with the drafter of the start.",
        },
    ),
    "train": Event(
        "An optimizer step was taken.",
        {
            "loss": "Sum of the objectives.",
            "objectives": "Loss and metrics of each objective.",
            **_SEEN,
            "new": "Requests of the batch that are new; 0 for a replayed batch.",
            "seconds": "Time of the step.",
            "waiting": "Requests that have arrived and are not learned from yet.",
            "batches": "Batches so far; of `aurora-rl train`, which writes no requests.",
        },
    ),
    "step_skipped": Event(
        "A step had no finite loss or gradient and was left out.",
        {
            **_REASON,
            "steps": _SEEN["steps"],
            "skipped": "Steps left out so far.",
            "batches": "Batches so far; only of `aurora-rl train`.",
        },
    ),
    "quarantined": Event(
        "No step could be taken on a batch for the sake of some of its trajectories, which the learner has dropped.",
        {
            "requests": "Their requests.",
            "sources": "Engines that sent them: names of their keys or, without keys, what they call themselves.",
            **_REASON,
            "steps": _SEEN["steps"],
        },
    ),
    "peers_refused": Event(
        "Connections were refused for their keys since the last such line; once a second at most. The log says why.",
        {"peers": "Connections refused so far.", "steps": _SEEN["steps"]},
    ),
    "drops": Event(
        "The learner dropped trajectories since the last such line; once a second at most.",
        {"reasons": "Trajectories by reason; see `dropped` in `status`.", "steps": _SEEN["steps"]},
    ),
    "engines": Event(
        "What arrived of each engine so far; every five seconds at most, if something is new.",
        {
            "engines": "By name, of the 64 engines that were heard last, and of all others together as `(others)`: "
            "`trajectories` that arrived; `version` that drafted the last round of the newest; `staleness`, versions "
            "that were published after it; `drops`, trajectories that the learner dropped by reason, as in `drops`.",
            "steps": _SEEN["steps"],
        },
    ),
    "deleted": Event(
        "The learner has dropped the trajectories of tenants whose data was to be deleted.",
        {
            "tenants": "Number of tenants.",
            "trajectories": "Trajectories that were dropped, learned from or not.",
            "steps": _SEEN["steps"],
        },
    ),
    "candidate": Event(
        "The gate holds back the next requests, to decide about a candidate.",
        {"tokens_entered": "Tokens that took the rows of others in its draft vocabulary.", **_SEEN},
    ),
    "gate": Event(
        "The gate has decided about a candidate.",
        {
            "publish": "True if the candidate will be served.",
            "difference": "Mean acceptance length of the candidate minus that of the serving weights.",
            "interval": "95% interval of that mean.",
            "candidate": "Acceptance length of the candidate.",
            "serving": "Acceptance length of the serving weights.",
            "requests": "Requests that decided.",
            "reason": "Why a candidate that cannot draft is refused; otherwise null.",
            "version": "Version that is published now; the candidate's where a trial at a share of the engines begins.",
            "seconds": "Time of the decision.",
            **_SEEN,
        },
    ),
    "engine_trial": Event(
        "A share of the engines gets new weights that passed the gate, to be compared with as many other engines.",
        {
            "version": "Version under which the first engines get them; those of later windows get higher ones.",
            "against": "Version that is published to all engines.",
            "engines": "Names of the first engines.",
            "of": "Engines that are connected.",
        },
    ),
    "engine_verdict": Event(
        "The trial of new weights at a share of the engines has ended.",
        {
            "version": "Version of the trial.",
            "against": "Version that was published to all engines meanwhile.",
            "published": "Version under which all engines get the new weights, or those that had them the former ones.",
            "promote": "True if all engines get the new weights, false if they were rolled back.",
            "reason": "What decided, in words.",
            "pairs": "Windows in which engines with the new weights were compared with as many others.",
            "requests": "Requests with the new weights in these windows.",
            "acceptance_length": "Tokens per round in them, of former and new weights; null without windows.",
            "tokens_per_second": "Tokens per second of a request while it is decoded, of both; null without windows, "
            "and where engines of earlier releases do not say it.",
            "evidence": "Evidence of a loss of either figure: 1 is none; weights are rolled back at 2 over "
            "`canary.false_alarm_rate`.",
        },
    ),
    "rejected": Event(
        "An engine did not load the newest weights, or rolled them back. It goes on with its former ones.",
        {"version": "Version of these weights.", "engine": "Name of the engine.", **_REASON, **_SEEN},
    ),
    "withdrawn": Event(
        "Engines rejected the newest weights and none serves them; the gate compares with those before again.",
        {"version": "Version of these weights.", **_SEEN},
    ),
    "renumbered": Event(
        "The weights that are served were published again. An engine ignored them, as it serves a version above theirs "
        "or other weights of it, or it is to have a version that was withdrawn.",
        {"version": "Version that they have now.", **_SEEN},
    ),
    "served": Event(
        "Once per version: whether the engine drafts with the weights that it reports.",
        {
            "version": "Version that the engine reports.",
            "drafts": "Drafts that were checked.",
            "own": "Drafts that match this version's weights.",
            "of_replaced": "Drafts that match the previous weights.",
        },
    ),
    "not_written": Event(
        "A training state, a drafter or a recording could not be written; learning goes on.",
        {"what": "What was to be written.", **_REASON},
    ),
    "checkpoint": Event("The training state was saved.", {**_SEEN, "version": "Version that is published now."}),
    "evaluation": Event(
        "`aurora-rl train`: the held-out requests were replayed.",
        {
            "epoch": "Passes over the recording so far.",
            "batches": "Batches so far.",
            "acceptance_length": "Acceptance length over all of them.",
            "domains": "Acceptance length by domain, or by recording if there are several.",
        },
    ),
    "learner_done": Event("The learner has ended in good order.", {**_SEEN, "version": "Last version published."}),
    # Events of a fleet.
    "member_started": Event(
        "`aurora-rl fleet`: the process of a member was started.",
        {
            "member": "Name of the member, such as chat-0 or learner.",
            "node": "Address of its node.",
            "url": "Where an engine is to listen; null without a port.",
            "restarts": "Times that it was started again after it had died.",
        },
    ),
    "member_ended": Event(
        "`aurora-rl fleet`: the process of a member has ended, or its node has gone.",
        {"member": "Name of the member.", **_REASON},
    ),
}
"""Every event by name, in the order of a run."""
