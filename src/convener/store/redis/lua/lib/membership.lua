-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why. A row of `info` is `ttl|renew|text`, one of `why`
-- `kind|by|ms of silence`.
local PULSE_LIMIT, BURY_SLACK = 2000, 250
local function version() return tonumber(redis.call('GET', KEYS[4]) or 0) end
local function grace() return tonumber(redis.call('GET', KEYS[6]) or 0) end
-- An old pulse means that renewals could not arrive, so nobody's silence proves anything (core.membership._felt).
local function feel(ttl)
  local pulse = tonumber(redis.call('GET', KEYS[5]) or 0)
  if now - pulse > PULSE_LIMIT and redis.call('EXISTS', KEYS[1]) == 1 then
    redis.call('SET', KEYS[6], text(math.max(grace(), now + ttl)))
  end
end
local function terms(row)
  local ttl, renew, rest = string.match(row, '^(%d+)|(%d+)|(.*)$')
  return tonumber(ttl), tonumber(renew), rest
end
local function announce(channel)
  local changed = redis.call('INCR', KEYS[4])
  redis.call('SPUBLISH', channel, '{"t":"members","ver":' .. text(changed) .. '}')
  return changed
end
local function bury(channel, names, kind, by)
  for _, name in ipairs(names) do
    local row, deadline = redis.call('HGET', KEYS[3], name), redis.call('ZSCORE', KEYS[1], name)
    local silent = row and now - (tonumber(deadline) - (terms(row))) or 0
    redis.call('HSET', KEYS[7], name, kind .. '|' .. by .. '|' .. text(silent))
    redis.call('ZREM', KEYS[1], name)
    redis.call('HDEL', KEYS[3], name)
    redis.call('ZADD', KEYS[2], text(now), name)
  end
  announce(channel)
end
