// A baseline for revenue queries: Express and pg, as one would write it in an afternoon. One query
// a request, a pool of connections in each process. libpq's variables name the database.
// Usage: node express_pg.js PORT PROCESSES
const cluster = require("node:cluster");
const express = require("express");
const { Pool } = require("pg");

const [port, processes] = process.argv.slice(2).map(Number);
// As text, because a JavaScript number would round the revenue.
const QUERY = "SELECT trim_scale(revenue)::text AS revenue FROM users_revenue WHERE user_id = $1";

function serve() {
  const pool = new Pool({ max: 10 }); // pg's default
  const app = express();
  app.get("/userEvents/:userId", async (request, response) => {
    const { userId } = request.params;
    const { rows } = await pool.query(QUERY, [userId]);
    if (rows.length === 0) {
      response.status(404).json({ error: "no such user" });
      return;
    }
    const body = `{"userId": ${JSON.stringify(userId)}, "revenue": ${rows[0].revenue}}`;
    response.type("application/json").send(body);
  });
  app.listen(port, "127.0.0.1", 4096);
}

if (cluster.isPrimary) {
  for (let started = 0; started < processes; started += 1) {
    cluster.fork();
  }
} else {
  serve();
}
