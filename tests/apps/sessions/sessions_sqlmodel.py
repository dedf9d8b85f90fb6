"""Two sharded tables declared with SQLModel."""

from sqlmodel import Field, Relationship, SQLModel

from shardalchemy import sharded_by


class Team(SQLModel, table=True):
    __table_args__ = {"info": sharded_by("id")}

    id: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    name: str
    heroes: list["Hero"] = Relationship(back_populates="team")


class Hero(SQLModel, table=True):
    __table_args__ = {"info": sharded_by("team_id")}

    team_id: int = Field(foreign_key="team.id", primary_key=True)
    name: str = Field(primary_key=True)
    team: Team = Relationship(back_populates="heroes")
