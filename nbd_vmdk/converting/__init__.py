"""Copying a disk between everything that can hold one: images, raw files, devices, exports."""
