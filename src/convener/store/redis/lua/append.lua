#!lua
-- APPEND: the owner's only write (core.conversation.append). Loaded twice: `append`, and `append_final` that a full
-- store takes too, for the batch that ends a turn or the conversation.
-- KEYS 1 meta  2 log  3 in  4 seen  5 state
-- ARGV 1 channel  2 owner  3 epoch  4 expected seq  5 batch  6 cursor  7 done  8 base  9 '1' if stopped
--      10 '1' if 11 is a state  11 state  12… events
-- ->   seq (OK) | {'GAP'|'PENDING', seq, batch} | {'FENCED', seq, batch, owner, epoch}
-- @include now
-- @include publish
local SEEN_WINDOW = 256
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'seq', 'batch', 'cursor', 'position', 'done', 'base', 'status')
if not head[9] then return {'FENCED', 0, '', '', 0} end
if head[1] ~= ARGV[2] or head[2] ~= ARGV[3] then return {'FENCED', head[3], head[4], head[1], head[2]} end
if head[3] ~= ARGV[4] then return {'GAP', head[3], head[4]} end
if ARGV[9] == '1' and (head[9] ~= 'stopping' or head[6] ~= ARGV[6]) then return {'PENDING', head[3], head[4]} end

local expected = tonumber(ARGV[4])
for i = 12, #ARGV do
  local reply = redis.pcall('XADD', KEYS[2], ARGV[3] .. '-' .. text(expected + i - 11), 'e', ARGV[i])
  if reply.err then
    -- The second fence: the log holds a later epoch than the head, which went back in time.
    if i == 12 and string.find(reply.err, 'equal or smaller', 1, true) then
      return {'FENCED', head[3], head[4], head[1], head[2]}
    end
    return reply
  end
end
local seq = text(expected + #ARGV - 11)
local cursor, done = tonumber(ARGV[6]), tonumber(ARGV[7])
local changes = {'seq', seq, 'batch', ARGV[5], 'updated', text(now)}
local function change(name, value)
  changes[#changes + 1] = name
  changes[#changes + 1] = value
end
if cursor > tonumber(head[5]) then
  change('cursor', ARGV[6])
  redis.call('XTRIM', KEYS[3], 'MINID', text(cursor + 1) .. '-0')
end
if done > tonumber(head[7]) then
  change('done', ARGV[7])
  local forget = math.min(done, tonumber(head[6]) - SEEN_WINDOW)
  if forget > 0 then redis.call('ZREMRANGEBYSCORE', KEYS[4], '(0', text(forget)) end
end
if tonumber(ARGV[8]) > tonumber(head[8]) then change('base', ARGV[8]) end
if ARGV[9] == '1' then
  change('owner', '')
  change('nonce', '')
  change('status', 'stopped')
  change('done', head[6])
end
redis.call('HSET', KEYS[1], unpack(changes))
if ARGV[10] == '1' then redis.call('SET', KEYS[5], ARGV[11]) end
if #ARGV > 11 then publish_log(ARGV[1], ARGV[3], text(expected + 1), ARGV, 12) end
return expected + #ARGV - 11
