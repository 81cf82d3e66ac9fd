#!lua
-- INDEX: activity now, in a user's list.
-- KEYS 1 conversations of the user
-- ARGV 1 '1' to change only what is in the list  2… cids
-- ->   number of changes
-- @include now
local ts = text(now)
for i = 2, #ARGV do
  if ARGV[1] == '1' then
    redis.call('ZADD', KEYS[1], 'XX', ts, ARGV[i])
  else
    redis.call('ZADD', KEYS[1], ts, ARGV[i])
  end
end
return #ARGV - 1
