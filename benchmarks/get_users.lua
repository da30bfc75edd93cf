-- The requests ask for the revenue of the users in the arguments, one after the other, again and
-- again.
local requests = {}
local last = 0

function init(users)
    for i, user in ipairs(users) do
        requests[i] = wrk.format("GET", "/userEvents/" .. user)
    end
end

function request()
    last = last % #requests + 1
    return requests[last]
end
