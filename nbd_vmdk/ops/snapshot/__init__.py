"""Snapshots: making child links, showing the tree, merging, moving and removing links.

A verb of ``nbd-vmdk snapshot`` is a module, with the order of its steps and why it can be stopped anywhere:

    create    a new child on an image
    listing   every link of some folders, as trees (``list``)
    commit    a child goes into its parent; plan.py finds out what that means and how far it came before,
              merge.py moves the bytes, once the parent is as large as the child (see ops/resize)
    rebase    a child gets another parent, or none, and shows what it showed
    delete    one link goes, and what stands on it is rebased

They stand on what is known of links, and on what is done to them:

    tree        the links in folders, by their descriptors alone: who is whose parent
    files       opening links, pointing them to a parent, removing their files
    names       what a new child is called, and a link that is being merged
    secondname  a file gets a second name, or loses one, durably
    records     what machines say of links: who writes to it, which snapshot it is
    machines    the lines in machines' files that name a link, and changing them

Resizing, compacting, renaming and cloning (the folders beside this one) use these as well.
"""
