"""Disks as devices and files of this machine, by the kernel's NBD client and by nbdfuse."""
