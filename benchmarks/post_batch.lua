-- A request has a batch of events; its number of lines is the argument.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/x-ndjson"

function init(arguments)
    local event = '{"userId": "user123", "name": "add_revenue", "value": 100}\n'
    wrk.body = string.rep(event, tonumber(arguments[1]))
end
