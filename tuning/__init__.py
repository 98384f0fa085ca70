"""The hyper-parameter search: Optuna proposes, Ray Tune runs; every trial is a training run of msrn_ray."""
