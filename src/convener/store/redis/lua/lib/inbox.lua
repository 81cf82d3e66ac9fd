-- Put an entry into the inbox in KEYS[2] and move the head in KEYS[1]; the caller publishes it last.
local function put_inbox(position, id, kind, user, ts, data)
  redis.call('XADD', KEYS[2], position .. '-0', 'id', id, 'kind', kind, 'user', user, 'ts', ts, 'data', data)
  redis.call('HSET', KEYS[1], 'position', position, 'updated', ts)
end
