"""HOW the operations run on a GPU: Triton kernels, one file per operation, with the name of its twin in `ops/`.

This package is the only place that knows triton. It is imported when a kernel first runs. `TRITON_INTERPRET=1`, set
before that, runs the same kernels on a CPU, slowly: for tests.
"""
