"""nbd-vmdk and its peers measured side by side: ``make bench``, or ``python -m benchmarks --help``.

What is compared:

- ours: nbdkit with ``plugin.py``, started as ``nbd-vmdk serve`` starts it;
- qemu-nbd on the same image, with ``--aio=threads`` and with ``--aio=io_uring``.  "qemu-nbd" in a ratio is
  whichever of the two is better at that workload;
- ``nbdkit file`` on the same data in a raw file: the limit of what any nbdkit plugin can do;
- the least that a plugin in Python can do, one system call a request on that raw file: what separates it from
  ``nbdkit file`` is Python's part of the distance, and what separates ours from it is our own.

Where ours misses a target the report says whether these two would, in its place.

How a number comes about.  A *workload* (workloads.py) is one image, one client and one pattern.  In each
*round* every server runs each workload once, in an order that rotates, so that whatever else the machine does
hits all of them alike; each run has a server of its own, started for it and stopped after it.  The number is
the median over the rounds, and a ratio is the median of those of single rounds, always "how many times
better": a virtual machine may be half as fast for some minutes, which then hits both sides of a ratio.

What would make a number a lie, and what is done about it:

- data not in the page cache, or only half: files are read before warm runs, and dropped before cold ones;
- disk blocks that were never written, which are several times slower than used ones: runs write to a file
  system all of whose blocks were written before (blocks.py), and all writes are measured on tmpfs as well;
- writes that are only acknowledged: every run of writes ends with a flush inside the measured time, and
  starts from a fresh copy of the image;
- wrong answers that are fast: before the first round every server's bytes are compared with the raw file's;
- two measurements at once: a lock.
"""
