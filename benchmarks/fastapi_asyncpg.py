"""A baseline for revenue queries: FastAPI and asyncpg, as one would write it in an afternoon. One
query a request, a pool of connections in each process. libpq's variables name the database. Usage:
python fastapi_asyncpg.py PORT PROCESSES"""
import contextlib
import json
import sys

import asyncpg
import fastapi
import uvicorn

# As text, because a Python float would round the revenue.
QUERY = "SELECT trim_scale(revenue)::text FROM users_revenue WHERE user_id = $1"


@contextlib.asynccontextmanager
async def pool(application):
    """Keep a pool of connections as long as the application runs."""
    async with asyncpg.create_pool(min_size=10, max_size=10) as connections:  # asyncpg's defaults
        application.state.pool = connections
        yield


app = fastapi.FastAPI(lifespan=pool)


@app.get("/userEvents/{user_id}")
async def revenue(user_id: str):
    """Answer the revenue of a user."""
    amount = await app.state.pool.fetchval(QUERY, user_id)
    if amount is None:
        raise fastapi.HTTPException(404, "no such user")
    body = f'{{"userId": {json.dumps(user_id)}, "revenue": {amount}}}'
    return fastapi.Response(body, media_type="application/json")


if __name__ == "__main__":
    port, processes = map(int, sys.argv[1:])
    sys.path.insert(0, "")
    uvicorn.run("fastapi_asyncpg:app", host="127.0.0.1", port=port, workers=processes,
                backlog=4096, access_log=False, log_level="error")
