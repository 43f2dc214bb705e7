"""The attention kernels: fwd, combine, bwd_dq, bwd_dkdv, and the device functions they are made of."""
