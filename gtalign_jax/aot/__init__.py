"""What a program costs on a TPU, known without one: topologies, chips, compiled text, roofline.

    topology.describe(name)  -> devices to build a mesh of, for any Cloud TPU slice
    hlo.collectives(text)    -> what the compiled program sends over the interconnect
    roofline.*_work(...)     -> floating-point operations and HBM bytes by formula
    roofline.seconds(...)    -> a lower bound of the time, and model FLOPs utilisation
"""
