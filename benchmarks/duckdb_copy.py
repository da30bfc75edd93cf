"""A baseline for data_processor.py: sum a log with DuckDB and copy the sums to the table duckdb in
PostgreSQL. It tells no repeated event. libpq's variables name the database. Usage: python
duckdb_copy.py LOG"""
import sys

import duckdb
import psycopg2

SUM_LOG = """
    COPY (
        SELECT "userId", sum(CASE name WHEN 'add_revenue' THEN value ELSE -value END)
        FROM read_json(
            $log,
            format = 'newline_delimited',
            columns = {'userId': 'VARCHAR', 'name': 'VARCHAR', 'value': 'DECIMAL(38, 18)'})
        GROUP BY "userId"
    ) TO 'sums.csv' (FORMAT csv, HEADER false)
"""


def main():
    """Write the sums to sums.csv in the working directory, and from there to PostgreSQL."""
    duckdb.execute(SUM_LOG, {"log": sys.argv[1]})
    with psycopg2.connect("") as connection, connection.cursor() as sql, open("sums.csv") as sums:
        sql.execute("CREATE TABLE duckdb (LIKE users_revenue INCLUDING ALL)")
        sql.copy_expert("COPY duckdb FROM STDIN (FORMAT csv)", sums)


if __name__ == "__main__":
    main()
