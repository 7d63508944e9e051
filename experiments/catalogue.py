"""The table of all figures: the command that each was reported with, and a short one that shows the same on a laptop.

Read by `experiments.reproduce`, which runs the commands, by `experiments.gallery`, which shows the figures beside them, and by
`experiments.claims`, which takes the commands of its results from here.
"""

import importlib
import shlex
from importlib.util import find_spec
from typing import Any, NamedTuple

import tyro

SABA = "Dagréou, Ablin, Vaiter, Moreau, 2022, arXiv 2201.13409"
STOCBIO = "Ji, Yang, Liang, 2021, arXiv 2010.07962"
THESIS = "Ji, 2021, arXiv 2108.00330"
MEHA = "Liu, Liu, Yao, Zeng, Zhang, 2024, arXiv 2405.09927"
ANIL = "Ji, Lee, Liang, Poor, 2020, arXiv 2006.09486"
MAML = "Ji, Yang, Liang, 2022, arXiv 2002.07836"
PZOBO = "Sow, Ji, Liang, 2022, arXiv 2110.07004"
BOUNDS = "Ji, Liang, 2023, arXiv 2102.03926"
ADBO = "Jiao, Yang, Wu, Song, Jian, 2023, arXiv 2212.10048"
DARTS = "Liu, Simonyan, Yang, 2019, arXiv 1806.09055"
MAML_2017 = "Finn, Abbeel, Levine, 2017, arXiv 1703.03400"


class Figure(NamedTuple):
    """A figure, or a table of results that has none."""

    name: str  # of its picture, experiments/gallery/NAME.png, and of its folder of results
    title: str
    shows: str  # what is compared, and what to look at
    paper: str  # of the comparison; empty where it is of this library alone
    command: str  # after ``python -m``: as reported in the READMEs
    laptop: str  # the same comparison in less time; empty where `experiments.reproduce` leaves it out
    minutes: float  # that the command takes, on two busy cores
    seconds: float  # of processor time that the laptop command takes
    drawn: bool = True  # whether there is a picture


FIGURES = (
    Figure(
        "breast_cancer",
        "Hyperparameter selection on bundled data",
        "One l2 weight a feature of a logistic regression, chosen on held-out rows: the gap to the optimum and the norm of the "
        "hypergradient. The demo of this library.",
        SABA,
        "experiments.hyperparameter_selection --dataset breast_cancer",
        "experiments.hyperparameter_selection --dataset breast_cancer",
        minutes=0.5,
        seconds=29,
    ),
    Figure(
        "ijcnn1",
        "Hyperparameter selection on IJCNN1",
        "The same on 49,990 training rows: SABA goes on where SOBA stalls.",
        SABA,
        "experiments.hyperparameter_selection --dataset ijcnn1 --solvers soba ma_soba saba srba --seeds 10",
        "experiments.hyperparameter_selection --dataset ijcnn1 --solvers soba ma_soba saba srba --seeds 2 --evaluations 16",
        minutes=14,
        seconds=150,
    ),
    Figure(
        "mnist_cleaning",
        "Data cleaning on MNIST, half of the labels replaced",
        "One weight a training row: the test error of the classifier, and how many of the wrong labels get the lowest weights.",
        SABA,
        "experiments.data_cleaning --dataset mnist --corruption 0.5 --solvers soba ma_soba saba srba fsla --seeds 10",
        "experiments.data_cleaning --dataset mnist --corruption 0.5 --solvers soba ma_soba saba srba fsla --seeds 2",
        minutes=9,
        seconds=84,
    ),
    Figure(
        "digits_cleaning",
        "Data cleaning on bundled digits",
        "The same on 8 x 8 pixels: no download.",
        SABA,
        "experiments.data_cleaning --dataset digits --corruption 0.5 --seeds 3",
        "experiments.data_cleaning --dataset digits --corruption 0.5 --seeds 3",
        minutes=1,
        seconds=29,
    ),
    Figure(
        "thesis_cleaning",
        "Data cleaning at the settings of the bilevel thesis",
        "Thirteen solvers, double loops among them: the test loss against seconds and oracle calls.",
        f"{THESIS}; {STOCBIO}",
        "experiments.data_cleaning --dataset mnist --setting thesis --corruption 0.4 --seeds 2",
        "experiments.data_cleaning --dataset mnist --setting thesis --corruption 0.4 --seeds 1 --shorter 2 --evaluations 5 "
        "--solvers stocbio amigo saba soba mrbo sustain bsa ttsa aid_fp",
        minutes=29,
        seconds=200,
    ),
    Figure(
        "meha_cleaning_mnist",
        "Data cleaning at the setting of the MEHA paper, MNIST",
        "Ten solvers, first-order ones among them, and three baselines that clean nothing or know the clean rows.",
        MEHA,
        "experiments.data_cleaning --dataset mnist --setting meha --draws 3",
        "experiments.data_cleaning --dataset mnist --setting meha --draws 1",
        minutes=17,
        seconds=143,
    ),
    Figure(
        "meha_cleaning_fashion_mnist",
        "Data cleaning at the setting of the MEHA paper, Fashion-MNIST",
        "The same on another data set.",
        MEHA,
        "experiments.data_cleaning --dataset fashion_mnist --setting meha --draws 3",
        "experiments.data_cleaning --dataset fashion_mnist --setting meha --draws 1",
        minutes=17,
        seconds=140,
    ),
    Figure(
        "nonconvex_merely_convex",
        "A toy problem with a merely convex inner loss",
        "Errors of MEHA and eleven other methods, each at the fastest setting of its grid; MEHA at sizes up to 100,000.",
        MEHA,
        "experiments.nonconvex --problem merely_convex",
        "experiments.nonconvex --problem merely_convex",
        minutes=2,
        seconds=60,
    ),
    Figure(
        "nonconvex_sine",
        "A toy problem with a nonconvex inner loss",
        "The same where every inner problem has many minimisers, and from which starts MEHA finds the right one.",
        MEHA,
        "experiments.nonconvex --problem sine",
        "experiments.nonconvex --problem sine",
        minutes=2,
        seconds=60,
    ),
    Figure(
        "nonconvex_lasso",
        "A toy problem with a nonsmooth inner loss",
        "MEHA beside searches and the exact derivative on a lasso.",
        MEHA,
        "experiments.nonconvex --problem lasso",
        "experiments.nonconvex --problem lasso",
        minutes=2,
        seconds=60,
    ),
    Figure(
        "group_lasso",
        "Group lasso",
        "A penalty for each group of features: MEHA, searches and implicit differentiation against work.",
        f"{MEHA}; data after Gao, Ye, Yin, Zeng, Zhang, 2022 (ICML)",
        "experiments.group_lasso --features 600 1200 2400 3600",
        "experiments.group_lasso --features 600",
        minutes=15,
        seconds=36,
    ),
    Figure(
        "architecture_search",
        "Architecture search on CIFAR-10",
        "Searches for the cells of a small network by MEHA and DARTS, and the cells found beside random ones.",
        f"{MEHA}; {DARTS}",
        "experiments.architecture_search --seeds 3",
        "experiments.architecture_search --seeds 1 --methods darts_first meha --epochs 2 --training-epochs 3",
        minutes=23,
        seconds=180,
    ),
    Figure(
        "few_shot_omniglot",
        "Few-shot learning on Omniglot",
        "Accuracy of MAML and ANIL on characters that they have not seen, 5-way 1-shot.",
        f"{MAML_2017}; {ANIL}",
        "experiments.few_shot --dataset omniglot --solvers maml anil",
        "experiments.few_shot --dataset omniglot --solvers maml anil --steps 500 --evaluations 5 --test-tasks 200",
        minutes=9,
        seconds=148,
    ),
    Figure(
        "few_shot_digits",
        "Few-shot learning on bundled digits",
        "Six methods on digits, of which some classes are held out.",
        f"{MAML_2017}; {ANIL}",
        "experiments.few_shot --dataset digits --solvers maml anil imaml fomaml reptile meha",
        "experiments.few_shot --dataset digits --solvers maml anil imaml fomaml reptile meha --steps 300 --test-tasks 200",
        minutes=2,
        seconds=80,
    ),
    Figure(
        "few_shot_sinusoids",
        "Few-shot regression of sinusoids",
        "Squared errors of four methods on sine waves of random amplitude and phase.",
        MAML_2017,
        "experiments.few_shot --dataset sinusoid --cores 1 --solvers maml fomaml reptile imaml",
        "experiments.few_shot --dataset sinusoid --cores 1 --solvers maml fomaml reptile imaml",
        minutes=1,
        seconds=45,
    ),
    Figure(
        "maml_theory",
        "Theory of multi-step MAML and ANIL",
        "The bias of first-order MAML, the smoothness of the meta-objective, and ANIL's inner steps in two geometries.",
        f"{MAML}; {ANIL}",
        "experiments.maml_theory",
        "experiments.maml_theory --seeds 2",
        minutes=7,
        seconds=120,
    ),
    Figure(
        "newsgroups",
        "Learned regularisation on 20 Newsgroups",
        "One l2 weight a word of a text classifier, at the settings of the stocBiO paper: compares how fast z moves.",
        STOCBIO,
        "experiments.learned_regularisation",
        "experiments.learned_regularisation --seconds 8",
        minutes=3.5,
        seconds=44,
    ),
    Figure(
        "newsgroups_learned",
        "Learned regularisation on 20 Newsgroups, x learned",
        "The same at settings at which the weights of the words do move, beside weights that stay at 0.",
        STOCBIO,
        "experiments.learned_regularisation --solvers amigo soba fixed_x --outer adam --outer-rate 0.05 --seconds 100",
        "experiments.learned_regularisation --solvers amigo soba fixed_x --outer adam --outer-rate 0.05 --seconds 20 "
        "--vocabulary 10000",
        minutes=6,
        seconds=41,
    ),
    Figure(
        "hyper_representation",
        "Hyper-representation, linear features",
        "Features learned for ridge regression: the loss after the inner steps, and at the exact inner solution.",
        PZOBO,
        "experiments.hyper_representation",
        "experiments.hyper_representation",
        minutes=0.5,
        seconds=25,
    ),
    Figure(
        "hyper_representation_deep",
        "Hyper-representation, two layers",
        "The same with two sigmoid layers.",
        PZOBO,
        "experiments.hyper_representation --layers deep --seeds 1 --solvers pzobo pzobo_unit fo_itd_bio aid_fp aid_cg hozog",
        "experiments.hyper_representation --layers deep --seeds 1 --rows 1000",
        minutes=4,
        seconds=60,
    ),
    Figure(
        "rates",
        "Rates",
        "Errors of all solvers against oracle calls on quadratics with closed forms, and the slopes of theory.",
        "the papers of the solvers",
        "experiments.rates",
        "experiments.rates --seeds 3 --repeats 8",
        minutes=4,
        seconds=170,
    ),
    Figure(
        "lower_bounds",
        "Lower bounds",
        "Worst cases: how far the information travels in a sweep, and the work of AccBiO and AID-BiO above the bound.",
        BOUNDS,
        "experiments.lower_bounds",
        "experiments.lower_bounds",
        minutes=1,
        seconds=64,
    ),
    Figure(
        "asynchronous_mnist",
        "ADBO against time, MNIST",
        "Data cleaning by 18 workers, without and with stragglers: accuracy and loss against virtual seconds and bytes.",
        ADBO,
        "experiments.asynchronous --dataset mnist",
        "experiments.asynchronous --dataset mnist --seeds 1 --steps 1000",
        minutes=15,
        seconds=75,
    ),
    Figure(
        "asynchronous_fashion_mnist",
        "ADBO against time, Fashion-MNIST",
        "The same on another data set.",
        ADBO,
        "experiments.asynchronous --dataset fashion_mnist",
        "experiments.asynchronous --dataset fashion_mnist --seeds 1 --steps 1000",
        minutes=15,
        seconds=75,
    ),
    Figure(
        "asynchronous_ijcnn1",
        "ADBO against time, IJCNN1",
        "Regularisation of a logistic regression by 24 workers.",
        ADBO,
        "experiments.asynchronous --task regularisation",
        "experiments.asynchronous --task regularisation --seeds 1",
        minutes=5,
        seconds=25,
    ),
    Figure(
        "asynchronous_covtype",
        "ADBO against time, Covertype",
        "The same on another data set by 18 workers.",
        ADBO,
        "experiments.asynchronous --task regularisation --dataset covtype",
        "experiments.asynchronous --task regularisation --dataset covtype --seeds 1",
        minutes=10,
        seconds=40,
    ),
    Figure(
        "asynchronous_digits",
        "ADBO against time, bundled digits",
        "Data cleaning by 4 workers: no download.",
        ADBO,
        "experiments.asynchronous",
        "experiments.asynchronous",
        minutes=2,
        seconds=22,
    ),
    Figure(
        "asynchronous_digits_published",
        "ADBO against time, bundled digits, published step sizes",
        "The same with the step sizes of ADBO's public code.",
        ADBO,
        "experiments.asynchronous --rates published",
        "",
        minutes=2,
        seconds=0,
        drawn=False,
    ),
    Figure(
        "asynchronous_digits_cleaning",
        "ADBO against time, bundled digits, weights that move",
        "The same with step sizes at which the weights of the rows move.",
        ADBO,
        "experiments.asynchronous --rates cleaning --methods adbo sdbo",
        "",
        minutes=2,
        seconds=0,
        drawn=False,
    ),
    Figure(
        "asynchronous_toy",
        "ADBO on a quadratic",
        "Six workers and a closed form: the hypergradient and the disagreement, for several ways to make cuts.",
        ADBO,
        "experiments.asynchronous --task toy",
        "experiments.asynchronous --task toy",
        minutes=1,
        seconds=26,
    ),
    Figure(
        "asynchronous_scaling",
        "What 1,000 workers cost",
        "Messages, bytes and memory of ADBO, from schedules alone.",
        ADBO,
        "experiments.asynchronous --task scaling",
        "",
        minutes=2,
        seconds=0,
        drawn=False,
    ),
    Figure(
        "asynchronous_ray",
        "ADBO against time, real processes",
        "ADBO and SDBO in five processes of one machine, with real seconds (needs the extra cluster).",
        ADBO,
        "experiments.asynchronous --engine ray --methods adbo sdbo --steps 400 --seeds 1",
        "",
        minutes=5,
        seconds=0,
        drawn=False,
    ),
    Figure(
        "long_run",
        "A long run",
        "What SABA on digits records in a run that goes on after it was killed; with --kills it is, and nothing differs.",
        "",
        "experiments.long_run --steps 2000 --every 20 --save-every 200",
        "experiments.long_run --steps 2000 --every 20 --save-every 200",
        minutes=1,
        seconds=8,
    ),
)


def parse(command: str) -> Any:
    """The settings of a command: an instance of its module's Config."""
    module, *arguments = shlex.split(command)
    spec = find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"command: got {module}, which is not a module")
    package = spec.submodule_search_locations is not None
    return tyro.cli(importlib.import_module(f"{module}.__main__" if package else module).Config, args=arguments)
