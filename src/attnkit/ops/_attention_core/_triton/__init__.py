"""The attention kernels: fwd, combine, bwd_prep, bwd_dkdv, bwd_dq, and the device functions they are made of."""
