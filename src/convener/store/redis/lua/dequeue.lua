#!lua flags=allow-oom
-- DEQUEUE: leave the queue.
-- KEYS 1 wait
-- ARGV 1 cid
-- ->   1 if it was in it else 0
for _, entry in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if string.match(entry, '^([^|]*)|') == ARGV[1] then return redis.call('ZREM', KEYS[1], entry) end
end
return 0
