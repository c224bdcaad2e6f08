"""Memory of a run, per GPU and by part, for every way to place the teacher - before anything is loaded."""

from lead_ds.plan.memory import StudentMemory, TeacherMemory, student_memory, teacher_memory
from lead_ds.plan.placement import Cluster, Estimate, Plan, Requirements, make_plan
from lead_ds.plan.shapes import ModelShape, Parameter
from lead_ds.plan.table import activation_table, plan_json, plan_table

__all__ = [
    "Cluster",
    "Estimate",
    "ModelShape",
    "Parameter",
    "Plan",
    "Requirements",
    "StudentMemory",
    "TeacherMemory",
    "activation_table",
    "make_plan",
    "plan_json",
    "plan_table",
    "student_memory",
    "teacher_memory",
]
