-- A request has one event.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"userId": "user123", "name": "add_revenue", "value": 100}\n'
