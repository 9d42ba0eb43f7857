"""The article: every figure in it comes from what the steps found; what was not run is said to be lacking."""

from __future__ import annotations

from case_study import attacks, results
from case_study.figures import Findings
from case_study.paper import Article, Block, Code, Table, Text
from case_study.runner import NOT_RUN
from case_study.wording import at_epsilon, capital, interval, network_name, points
from mpc_fl.apps.formats import duration

TITLE = "Federated learning and encrypted diagnosis of chest X-rays: a case study"
_WAYS = """Ways of training. Central: all films in one place. Alone: a hospital by itself, mean over all three. Federated:
an update of each hospital leaves it masked, and the sum over all alone is opened. With local noise each hospital hides its
patients by itself; with distributed noise each adds a part, and the sum has it all (discrete Gaussian). The patient is the
unit of privacy, delta is 1e-5, and the mean of features is charged like everything else that is released."""
_AFTER = """After Kaissis et al. (PriMIA, Nature Machine Intelligence 2021) we take paediatric chest X-rays of three
classes, secure sums, noise and encrypted inference; after Warnat-Herresthal et al. (Swarm Learning, Nature 2021) unequal
sites, and hospitals without anybody in the middle that join and leave. Attacks: gradient inversion (Geiping et al. 2020),
membership by likelihood ratios (Carlini et al. 2022), a lower bound on epsilon by canaries (Steinke et al. 2023)."""
_LIMITS = (
    """All hospitals were processes on one machine: times are those of shared cores and of links without distance, and one
    public data set, divided at random, stands for them. Real sites differ in more than that.""",
    """Films are of children of one centre; some patients recur in the test set. Nothing here says that a model is fit for use.""",
    """Runs with real parties were made once each, so that their figures have the interval of the test films alone; the
    tables have the repetitions. With noise each run is one draw.""",
    """Attacks are those that were tried. A better one finds more in plaintext, in sums and in models; a bound that is not
    exceeded is no proof. Gradient inversion was made on phantoms of 32 pixels, one film to a hospital, the easiest case for
    it.""",
    "A sum without noise shows what it shows: with three hospitals each knows the sum of the other two.",
)


def _abstract(found: Findings) -> list[Block]:
    head = found.study.head
    said = [
        """Hospitals that may not show each other films train one model, and diagnose with it. We measure what that costs in
        accuracy, privacy, time and bytes, beside training with all films in one place and beside each hospital alone, and
        attack what leaves a hospital."""
    ]
    for epsilon in (None, 8.0, 1.0):
        together = found.row(head, "local" if epsilon is None else "distributed", epsilon)
        alone = found.row(head, "alone", epsilon)
        if together and alone:
            said.append(
                f"""{capital(at_epsilon(epsilon))} a federation of three with a linear layer on {network_name(head)}
                features reaches {interval(together.figures["accuracy"])} of test films, a hospital alone
                {interval(alone.figures["accuracy"])}."""
            )
    small = found.row("small", "distributed", 8.0)
    if small:
        said.append(f"A network trained from nothing reaches {interval(small.figures['accuracy'])} at epsilon 8.")
    said += attacks.attacks_in_short(found)
    if found.diagnoses:
        compared = [of.summary.comparison for of in found.diagnoses.values()]
        images = sum(of.summary.images for of in found.diagnoses.values())
        same = "all" if all(of is not None and of.classes_agree for of in compared) else "not all"
        said.append(f"Of {images} diagnoses under encryption {same} are those of the same model in the clear.")
    said.append("Intervals are of 95 %.")
    return [Text(" ".join(said))]


def _methods(found: Findings) -> list[Block]:
    blocks = list[Block]()
    if found.survey is not None:
        counted = " ".join(
            f"{name}: {of.patients} patients with {of.records} films, {of.class_counts} by class."
            for name, of in found.survey.parts.items()
        )
        patients = ", ".join(map(str, found.survey.training_patients))
        text = f"""Films. {counted} Three hospitals have {patients} training patients; no patient is at two. Test patients who are
        by name also training patients stay in the test set, so that figures compare with those of others."""
        blocks.append(Text(text))
    seeds = max((of.seeds for table in found.tables.values() for of in table.table), default=0)
    trained = f"{seeds} trainings, in each of which patients are divided anew" if seeds else "repeated training"
    networks = f"""Networks. A linear layer on {network_name(found.study.head)} features, which hospitals compute once
    from their own films with public weights or formulas; and a small convolutional network that is trained as a whole, from
    nothing. Learning rates, clipping and steps were chosen on blocks of the training patients, as docs/chest_xray_table.md says."""
    figures = f"""Figures of tables are of {trained}. Their intervals cover the choice of seeds and of test patients,
    whose films stay together (bootstrap, 2,000 draws). Comparisons take the same patients and the same seeds on both sides;
    they are not corrected for their number. Rows of tables are computed by the functions that parties call, without masks,
    which cancel exactly; runs of real parties, each a process with links of its own, stand beside them."""
    return [*blocks, Text(_WAYS), Text(networks), Text(figures), Text(_AFTER)]


def _negative(found: Findings) -> list[Block]:
    said = list[str]()
    for of in found.comparisons:
        where = f"{capital(network_name(of.network))}, {at_epsilon(of.epsilon)}"
        first, second = network_name(of.first), network_name(of.second)
        if of.accuracy.high < 0:
            said.append(f"{where}: {first} is worse than {second} ({points(of.accuracy)}).")
        elif of.second == "alone" and of.accuracy.low <= 0:
            said.append(f"{where}: that {first} is better than {second} was not shown ({points(of.accuracy)}).")
    said += results.negative_of_runs(found)
    not_run = [name for name, why in found.lacking.items() if why == NOT_RUN]
    said += [f"The step {name} has no result: {why}" for name, why in found.lacking.items() if name not in not_run]
    said += [f"Not run: {', '.join(not_run)}."] if not_run else []
    if not said:
        return [Text("None of the comparisons came out against what was hoped for, and all steps came to their end.")]
    return [Text(sentence) for sentence in said]


def _limits(found: Findings) -> list[Block]:
    said = list[str]()
    if found.study.quick:
        said.append("This was a quick try: few rounds and seeds, no public network. Its figures are of no other use.")
    if found.study.synthetic:
        said.append("The films are phantoms: figures say that the study runs, and nothing of chest X-rays.")
    return [Text(sentence) for sentence in (*said, *_LIMITS)]


def _record(found: Findings) -> list[Block]:
    rows = tuple(
        (name, of.outcome, duration(of.seconds) if of.seconds else "", "" if of.status is None else of.status)
        for name, of in found.records.items()
    )
    commands = "\n".join(f"# {name}\n{of.command}" for name, of in found.records.items())
    total = sum(of.seconds for of in found.records.values())
    return [
        Text(f"All steps together took {duration(total)}. DIR holds the films, OUT what the study wrote; each run there has a "
             "report of its own."),
        Table("Steps", ("Step", "Outcome", "Time", "Exit status"), rows, 2),
        Code(commands),
    ]  # fmt: skip


def article_of(found: Findings) -> Article:
    """The whole article."""
    sections = {
        "Abstract": _abstract(found),
        "Methods": _methods(found),
        **results.all_sections(found),
        "Negative results": _negative(found),
        "Limits": _limits(found),
        "Steps and commands": _record(found),
    }
    remark = "QUICK TRY: few rounds and seeds" if found.study.quick else ""
    missing = len(found.lacking)
    if missing:
        remark = f"{remark}{'; ' if remark else ''}{missing} of {len(found.records)} steps have no result"
    return Article(TITLE, {name: blocks for name, blocks in sections.items() if blocks}, found.study.synthetic, remark)
