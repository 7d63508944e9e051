"""Seconds, megabytes and copies: what a step of a solver costs, beside the floor that nobody can go under.

``python -m experiments.speed`` prints two tables and writes them, with ``config.json``, to ``--out``.

*steps.csv*: one row a shape and solver.  ``floor`` is the same compiled loop and the same sampling around the bare derivatives
and plain SGD, written by hand.

=========================================  ==============================================================================
``wall_us``, ``process_us``                microseconds a step, median over the repeats
``wall_over_floor``, ``wall_over_soba``    median over the repeats of the ratio within a repeat; ``process_...`` likewise
``spread``                                 distance of the quartiles of the wall time, over its median: the noise
``compile_s``                              seconds to trace, lower and compile
``peak_mb``, ``data_mb``, ``tables_mb``    memory of the program (arguments, outputs, temporaries, minus what is aliased), and
                                           how much of it are the data set and the per-block tables
``finite``                                 whether the run stayed finite; if not, its times mean nothing
=========================================  ==============================================================================

*tables.csv*: SABA, whose step must never copy a whole table, in the four programs in which users run it: one scan, a host loop
over a jitted update with donated state (its batches are drawn beforehand), vmapped seeds (times are per seed), and guarded.
``copies`` counts whole-table copies in the compiled text, and must be 0.

Times on a busy machine.  Solvers alternate inside a repeat, so that ratios compare neighbours in time.  Wall time suffers from
other programs; process time does not, but on several cores it includes the waiting of XLA's worker threads, which spin.  So
the comparison is made on one core (``--pin``, the default where the system allows it: Linux), where process time is the
work done.  ``--no-pin`` shows what a free machine gives; read its wall times.  On an accelerator, too, only wall time counts.

Data are synthetic (Gaussian features, random labels) of the shapes of the papers' data sets; step sizes are constant.

``python -m experiments.speed hypergradients`` times one hypergradient instead, at a given inner solution (`implicit`) and
through 100 inner steps (`unrolled`), by this library, by others, and by hand.  Libraries that are not installed are left out,
by name; those of PyTorch run in a process of their own (``--torch-python``), and take their turn with the rest.  Its threads
wait passively unless OMP_WAIT_POLICY says otherwise: on a busy machine active ones take ten times as long.

*hypergradients.csv*: one row a case and variant.

=========================================  ==============================================================================
``wall_ms``, ``best_ms``, ``spread``       wall time on all cores: median and least of the repeats, and as above
``wall_over_floor``                        median of the ratio within a repeat to the first row of the case; ``process_...``
                                           likewise, of what runs in this process: read it with ``--pin`` on a busy machine
``error``                                  relative: to a float64 direct solve, or to the gradient of the plain scan
``residual``, ``result``                   what the library says: residual of the linear system over ``|d_z f|``, and a code
``memory_mib``                             temporaries of the compiled program; PyTorch: growth of its process at the peak
``compile_s``                              seconds to trace, lower and compile
=========================================  ==============================================================================

``python -m experiments.speed first_order`` takes MEHA, BOME, F2SA-2 and AID-CG to one accuracy on two toy problems, each at the
best of a small grid of settings, beside MEHA of boat-torch (``--torch-python``), which runs in a process of its own, on one
thread, at the settings that are best for ours with the exponent 1/4 that it has built in.

*first_order.csv*: one row a problem and method.

=========================================  ==============================================================================
``reached``, ``updates``, ``calls``        whether the accuracy is reached and kept within the limit; after how many updates
                                           (else the limit) and oracle calls
``update_us``, ``update_over_meha``        wall time of an update, and the median of its ratio to MEHA's within a repeat
``to_accuracy_ms``                         of all updates; inf if the accuracy is not reached
``setting``, ``end``                       step sizes and parameters; the means of x and z at the end
=========================================  ==============================================================================

``python -m experiments.speed --device gpu`` times updates of solvers at sizes that fill a device, beside ceilings measured in
the same run: see `experiments.speed.devices`, which says what the columns of *devices.csv* mean.
"""
