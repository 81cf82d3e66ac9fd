"""What convener's own tests stand on, for the tests of applications and of other stores.

`cluster.InProcessCluster` runs real managers inside one process; `faults.FaultyStore` and `steps` make a store fail
on purpose; `contract` holds a store to its obligations.
"""
