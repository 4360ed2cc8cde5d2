"""Triton kernels, one file each, with the stems of `fastdit/ops`; none imports `fastdit`."""
